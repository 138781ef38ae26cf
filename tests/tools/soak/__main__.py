"""Hours of work under random faults, or a crash at every named point: prints a table, and fails if anything was wrong.

python -m tests.tools.soak --minutes 60 --seed 7 [--database sqlite|postgresql|both] [--workers 3]
python -m tests.tools.soak --failpoints
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from batchmill.jobs.broker.embedded import start_process

DATABASES = ("sqlite", "postgresql")


def main() -> None:
    arguments = _arguments()
    for name in [name for name in os.environ if name.startswith("BATCHMILL_")]:
        del os.environ[name]
    if arguments.failpoints:
        from tests.tools.soak import failpoints

        sys.exit(0 if failpoints.sweep(arguments.point) else 1)
    print(f"seed {arguments.seed}", flush=True)
    if arguments.database == "both":
        sys.exit(_both(arguments))
    from tests.tools.soak.soak import Soak

    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="batchmill-soak-")) / arguments.database
    soak = Soak(
        arguments.database,
        seed=arguments.seed,
        minutes=arguments.minutes,
        workers=arguments.workers,
        folder=folder,
    )
    sys.exit(0 if soak.run() else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="of faults (default 60)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the faults and the jobs")
    parser.add_argument("--database", choices=[*DATABASES, "both"], default="both", help="default: both at once")
    parser.add_argument("--workers", type=int, default=3, help="that meet faults, one of them on another host")
    parser.add_argument("--folder", help="for logs and files; kept (default: a new one)")
    parser.add_argument("--failpoints", action="store_true", help="the sweep over all failpoints instead")
    parser.add_argument("--point", action="append", help="of the sweep: this failpoint alone (repeatable)")
    return parser.parse_args()


def _both(arguments: argparse.Namespace) -> int:
    """One soak for each database at the same time, in processes of their own; the tables come last, one by one."""
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="batchmill-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    words = ["--minutes", str(arguments.minutes), "--seed", str(arguments.seed), "--workers", str(arguments.workers)]
    running: dict[str, subprocess.Popen[bytes]] = {}
    for database in DATABASES:
        line = [sys.executable, "-u", "-m", "tests.tools.soak", "--database", database, "--folder", str(folder), *words]
        with (folder / f"{database}.log").open("wb") as log:
            running[database] = start_process(line, log=log)
    print(f"both at work; what they say goes to {folder}/*.log", flush=True)
    for process in running.values():
        _wait(process, list(running.values()))
    for database in DATABASES:
        print(f"\n=== {database}\n{_table(folder / f'{database}.log')}", flush=True)
    return max(abs(process.returncode) for process in running.values())


def _wait(process: subprocess.Popen[bytes], all_of_them: list[subprocess.Popen[bytes]]) -> None:
    while True:
        try:
            process.wait()
            return
        except KeyboardInterrupt:
            for each in all_of_them:
                each.terminate()


def _table(log: Path) -> str:
    """The part of the log after the last event, or its last lines where it has no table."""
    lines = log.read_text(errors="replace").splitlines()
    begins = [number for number, line in enumerate(lines) if line.startswith("batchmill ")]
    return "\n".join(lines[begins[-1] :] if begins else lines[-30:])


if __name__ == "__main__":
    threading.main_thread().name = "soak"
    main()
