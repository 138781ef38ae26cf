"""`make bench`: measures batchmill on this machine and prints a table. It asserts nothing.

python -m tests.bench [submit|echo|results|engine ...]
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as a worker sets it, before anything imports torch

from tests.bench import mill, model
from tests.bench.table import Row, show

BENCHES = {
    "submit": mill.submit,
    "echo": mill.echo,
    "results": mill.results_and_status,
    "engine": model.engine,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("bench", nargs="*", help=f"of {', '.join(BENCHES)} (default: all)")
    parser.add_argument("--lines", type=int, default=1_000_000, help="lines of the submitted file")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for name in arguments.bench or BENCHES:
        rows += BENCHES[name](arguments.lines)
    show(rows)


if __name__ == "__main__":
    main()
