"""The place of this worker's log file: made before the first line, and the files of long gone workers are removed."""

from __future__ import annotations

from pathlib import Path

from batchmill.jobs.errors import SettingsError
from batchmill.jobs.runtime.command_errors import refusal
from batchmill.jobs.runtime.home import make_home
from batchmill.jobs.runtime.log_file import log_path, older_files

#: Workers without a --name have a file per process, so the oldest files are removed.
_MOST_WORKERS = 200


def make_place(home: Path, worker: str) -> str | None:
    """Makes the file where there is none. Returns why it cannot be written, which stops no worker, or None."""
    path = log_path(home, worker)
    try:
        make_home(home)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.open("ab").close()
        _remove_oldest(path.parent)
    except SettingsError as error:
        return str(error)
    except OSError as error:
        return refusal(error)
    return None


def _remove_oldest(folder: Path) -> None:
    for path in sorted(folder.glob("*.log"), key=_written_at)[:-_MOST_WORKERS]:
        for each in (path, *older_files(path)):
            each.unlink(missing_ok=True)


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another worker that begins has removed it
        return 0.0
