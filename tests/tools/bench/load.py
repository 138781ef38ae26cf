"""Loading a model of random weights from a file that is not in memory yet, beside a plain read of that file.

python -m tests.tools.bench.load FOLDER QUANTIZATION prints the seconds of one load in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from tests.tools.bench.mill import home
from tests.tools.bench.table import Row

_MODEL = "250m"
_QUANTIZATIONS = ("none", "none:dtype=bfloat16", "int8", "nf4")
_READ_BYTES = 16 * 2**20


def load(_lines: int) -> list[Row]:
    """`make bench`: a Llama of 250 million weights, which takes seconds."""
    return _loads(_MODEL)


def load_1b(_lines: int) -> list[Row]:
    """A Llama of a billion weights."""
    return _loads("1b")


def _loads(name: str) -> list[Row]:
    """Seconds and bytes of the file a second, for every kind that a plain folder can be loaded as."""
    from tests.tools.bench.models import checkpoint

    with home() as root:
        folder = checkpoint(root, name)
        files = sorted(folder.glob("*.safetensors"))
        held_bytes = sum(each.stat().st_size for each in files)
        read = min(_read(files) for _ in range(2))
        rows = [_row(f"read the {held_bytes / 1e6:,.0f} MB of {name}", read, held_bytes)]
        for quantization in _QUANTIZATIONS:
            seconds = min(_loaded(folder, files, quantization) for _ in range(2))
            wanted = "under 60 s" if name == "1b" and quantization == "nf4" else ""
            rows.append(_row(f"load it, -q {quantization}", seconds, held_bytes, wanted))
    return rows


def _row(what: str, seconds: float, held_bytes: int, wanted: str = "") -> Row:
    return Row(what, f"{seconds:.2f} s, {held_bytes / seconds / 1e6:,.0f} MB/s", wanted)


def _forget(files: list[Path]) -> None:
    """Takes files out of the operating system's memory."""
    for each in files:
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _read(files: list[Path]) -> float:
    _forget(files)
    part = bytearray(_READ_BYTES)
    begin = perf_counter()
    for each in files:
        with each.open("rb", buffering=0) as opened:
            while opened.readinto(part):
                pass
    return perf_counter() - begin


def _loaded(folder: Path, files: list[Path], quantization: str) -> float:
    _forget(files)
    line = [sys.executable, "-m", "tests.tools.bench.load", str(folder), quantization]
    return float(subprocess.run(line, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Loads a model as a worker does before its first request, and prints the seconds; imports are not counted."""
    from batchmill.jobs.models.quantization import Quantization
    from batchmill.jobs.models.spec import ModelSpec
    from batchmill.worker.models.load import load as load_model

    folder, quantization = sys.argv[1:]
    loaded = load_model(ModelSpec(folder, quantization=Quantization.parse(quantization)), "cpu")
    print(loaded.load_seconds)


if __name__ == "__main__":
    main()
