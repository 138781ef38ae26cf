"""A table of measurements, and the machine that they were taken on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime

from batchmill.jobs import VERSION


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; `wanted` is what the project set itself."""

    what: str
    measured: str
    wanted: str = ""


def show(rows: list[Row]) -> None:
    print(f"batchmill {VERSION}, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.processor() or 'CPU'}")
    print(f"{platform.platform()}, Python {platform.python_version()}\n")
    widths = [max(len(row.what) for row in rows), max(len(row.measured) for row in rows)]
    print(f"| {'what':<{widths[0]}} | {'measured':<{widths[1]}} | wanted |")
    print(f"|{'-' * (widths[0] + 2)}|{'-' * (widths[1] + 2)}|--------|")
    for row in rows:
        print(f"| {row.what:<{widths[0]}} | {row.measured:<{widths[1]}} | {row.wanted} |")
