"""Many commands for the cost of one start: a process that has imported everything forks for each.

`finished` runs a command to its end as `subprocess.run` would; nothing but the start of the interpreter and the
imports is spared. Tests of these, of limits of the shell, and of processes that go on start Python themselves.

`python -m tests.support.processes.forked` reads a line of JSON for each command from stdin, {"words", "env", "folder",
"stdin", "seconds"}, and answers with one, {"code", "out", "err"}. Words that begin with `worker` may go to
`python -m batchmill.worker` in the same way, by {"module"}.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

#: The room of a pipe, in which stderr waits while stdout is read.
_PIPE_BYTES = 1024**2
#: The modules of commands that compute; they take 4 CPU-seconds to import, once for each process of pytest.
_COMPUTING = ["batchmill.worker.engine.transformers_kind", "batchmill.worker.evaluate.lineup"]
#: The word that asks for these.
_COMPUTES = "computes"
_idle: dict[bool, list[subprocess.Popen[str]]] = {False: [], True: []}


def finished(
    words: Sequence[str | Path],
    *,
    env: Mapping[str, str],
    computes: bool = False,
    folder: Path | None = None,
    stdin: str | None = None,
    seconds: int = 600,
) -> subprocess.CompletedProcess[str]:
    """Runs a command, and returns its exit code and what it wrote. It is killed by SIGALRM after so many seconds.

    computes: the command is one of `batchmill.worker` that uses torch itself, as `plan` and `evaluate` do.
    """
    try:
        server = _idle[computes].pop()
    except IndexError:
        server = _start([_COMPUTES] if computes else [])
    module = "batchmill.worker" if computes else "batchmill"
    try:
        said = answer(server, request(words, env=env, module=module, folder=folder, stdin=stdin, seconds=seconds))
    except BaseException:  # the test is over, and its command with it
        server.kill()
        server.communicate()
        raise
    _idle[computes].append(server)
    return subprocess.CompletedProcess(list(words), said["code"], said["out"], said["err"])


def request(words: Sequence[str | Path], **more: Any) -> str:
    """The line that asks for one command."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in more.items()}
    return json.dumps({"words": [*map(str, words)]} | given)


def answer(server: subprocess.Popen[str], line: str) -> dict[str, Any]:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{line}\n")
    server.stdin.flush()
    said: dict[str, Any] = json.loads(server.stdout.readline())
    return said


def _start(words: list[str]) -> subprocess.Popen[str]:
    """A process that ends with this one, whose end closes its stdin; it belongs to no home."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("BATCHMILL_")}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), environ.get("PYTHONPATH")]))
    line = [sys.executable, "-m", "tests.support.processes.forked", *words]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environ)


@atexit.register
def _end() -> None:
    for server in (*_idle[False], *_idle[True]):
        server.communicate()


def main() -> None:
    import batchmill.producer.cli.main
    import batchmill.worker.cli.worker  # noqa: F401

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as commands do before they import it
    for module in _COMPUTING if _COMPUTES in sys.argv else ():
        import_module(module)
    for line in sys.stdin:
        print(json.dumps(_run(**json.loads(line))), flush=True)  # noqa: T201


def _run(words: list[str], *, stdin: str | None = None, **given: Any) -> dict[str, Any]:
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(_file(stdin), 0)
        os.dup2(out_end, 1)
        os.dup2(err_end, 2)
        for end in (out, out_end, err, err_end):
            os.close(end)
        os._exit(_code(words, **given))
    for end in (out_end, err_end):
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        os.close(end)
    said = {}
    for name, end in (("out", out), ("err", err)):
        with open(end, encoding="utf-8", errors="replace") as file:
            said[name] = file.read()
    return {"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])} | said


def _file(text: str | None) -> int:
    """A file with this text, to be read from its beginning."""
    if text is None:
        return os.open(os.devnull, os.O_RDONLY)
    file = os.memfd_create("stdin")
    os.write(file, text.encode())
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _code(
    words: list[str],
    *,
    env: dict[str, str] | None = None,
    module: str = "batchmill",
    folder: str | None = None,
    seconds: int = 60,
) -> int:
    """The exit code of a command, with the traceback that the interpreter would print."""
    signal.alarm(seconds)
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
        sys.path.remove(str(ROOT))
    if folder is not None:
        os.chdir(folder)
    sys.stdin = os.fdopen(0, closefd=False)  # what is read ahead of the next commands stays with the parent
    sys.argv = [module, *words]
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
