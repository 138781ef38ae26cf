"""Many commands for the cost of one start: a process that has imported everything forks for each.

`python -m tests.support.processes.forked` reads [["status"], ["doctor", "--json"]] from stdin, runs each
as the installed script does, in its own folder, environment and limits, and prints a JSON list of
{"code", "out", "err"}. The words may begin with `worker`, which runs `python -m batchmill.worker` in the same way.
"""

from __future__ import annotations

import fcntl
import json
import os
import runpy
import signal
import sys
import traceback
from typing import Any

_SECONDS = 60
_PIPE_BYTES = 1024**2


def main() -> None:
    import batchmill.worker.cli.worker  # noqa: F401

    print(json.dumps([_run(words) for words in json.load(sys.stdin)]))  # noqa: T201


def _run(words: list[str]) -> dict[str, Any]:
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out_end, 1)
        os.dup2(err_end, 2)
        os._exit(_code(words))
    for end in (out_end, err_end):
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        os.close(end)
    said = {}
    for name, end in (("out", out), ("err", err)):
        with open(end, encoding="utf-8", errors="replace") as file:
            said[name] = file.read()
    return {"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])} | said


def _code(words: list[str]) -> int:
    """The exit code of a command, with the traceback that the interpreter would print."""
    signal.alarm(_SECONDS)
    module = "batchmill.worker" if words[0] == "worker" else "batchmill"
    sys.argv = [module, *(words[1:] if module == "batchmill.worker" else words)]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    return code


if __name__ == "__main__":
    main()
