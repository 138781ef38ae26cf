"""Measures batchmill on this machine and prints tables. It asserts nothing.

python -m tests.tools.bench [start|submit|echo|first|results|load|load-1b|line ...] [--lines N]
python -m tests.tools.bench engine --help
python -m tests.tools.bench decode --help
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tests.tools.bench.table import Row, show


def mill(words: Sequence[str]) -> None:
    """`make bench`: queue, store and the whole line."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as a worker sets it, before anything imports torch
    from tests.tools.bench import line, load, mill, start

    benches = {
        "start": start.start,
        "submit": mill.submit,
        "echo": mill.echo,
        "first": mill.first_answer,
        "results": mill.results_and_status,
        "load": load.load,
        "line": line.line,
    }
    asked_for = {"load-1b": load.load_1b}  # takes minutes
    parser = argparse.ArgumentParser(prog="python -m tests.tools.bench", description=__doc__)
    parser.add_argument("bench", nargs="*", help=f"of {', '.join(benches)} (default: all), {', '.join(asked_for)}")
    parser.add_argument("--lines", type=int, default=1_000_000, help="lines of the submitted file")
    arguments = parser.parse_args(words)
    rows: list[Row] = []
    for name in arguments.bench or benches:
        rows += (benches | asked_for)[name](arguments.lines)
    show(rows)


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["engine"]:
        from tests.tools.bench import lineup

        lineup.main(words[1:])
    elif words[:1] == ["decode"]:
        from tests.tools.bench import decode

        decode.main(words[1:])
    else:
        mill(words)


if __name__ == "__main__":
    main()
