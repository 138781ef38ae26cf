"""Files that a command writes for its user: checked before any work is done, and replaced whole at the end.

It knows neither what is written nor which command writes it.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from batchmill.jobs.errors import UsageError, WriteFailed
from batchmill.jobs.runtime.failpoints import failpoint

#: Characters of a file's name, of at most 255 bytes, in the name of the temporary file beside it.
_NAME_LENGTH = 40
#: Kinds that open as a file and are none: written to, they would be destroyed, or take nothing.
_NO_TARGETS = ((stat.S_ISDIR, "a folder"), (stat.S_ISBLK, "a disk"), (stat.S_ISSOCK, "a socket"))

#: Suffixes of the files of a model's or an adapter's folder; anything else in it is its owner's.
_OF_MODELS = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt"})


def model_files(folders: Iterable[Path]) -> Iterator[Path]:
    """The files of these folders that make a model or an adapter, and their templates."""
    for folder in folders:
        for each in (folder, folder / "additional_chat_templates"):
            if each.is_dir():
                yield from (file for file in each.iterdir() if file.suffix in _OF_MODELS)


def check_target(target: Path | None, *, keep: Iterable[str | Path] = (), prompts: str | None = None) -> None:
    """Raises UsageError for what could not be written at the end, or is `prompts` or one of `keep` by whatever name.

    `target`: None is stdout. `prompts`: the file of them that the command reads; `-` is stdin. `keep`: other files that
    it reads or that batchmill lives by, though they may not be there yet.
    """
    target_status = _of_stdout() if target is None else _of_path(target)
    is_file = target_status is None or stat.S_ISREG(target_status.st_mode)
    shown = "stdout" if target is None else f"-o {target}"
    if is_file and prompts is not None and _is_same(prompts, target, target_status):
        raise UsageError(f"{shown} is the file of prompts itself; name another")
    for each in keep if is_file else ():
        if _is_same(each, target, target_status):
            raise UsageError(f"{shown} would be written over {each}, which batchmill needs; name another file")
    if target is not None and is_file:
        _try_folder(target)


@contextmanager
def replaced(path: Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """A file that takes the place of `path` when the block ends well, and is gone otherwise; UTF-8 unless `binary`.

    The file that a link leads to is replaced, and not the link; another hard link keeps the old content. What is no
    file (/dev/null, a FIFO) is written to. Raises WriteFailed.
    """
    with written(path):
        if path.exists() and not path.is_file():
            with _opened(path, binary) as file:
                yield file
        else:
            with _beside(Path(os.path.realpath(path)), binary) as file:
                yield file


@contextmanager
def written(what: object) -> Iterator[None]:
    """Turns errors of the block into WriteFailed, about `what`; BrokenPipeError passes through."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise WriteFailed(f"cannot write {what}: {error.strerror or error}") from error


def _of_stdout() -> os.stat_result | None:
    try:
        return None if sys.stdout is None else os.fstat(sys.stdout.fileno())
    except OSError:
        return None


def _of_path(target: Path) -> os.stat_result | None:
    """The status of the target, None for a file that is not there yet. Raises UsageError for what takes no output."""
    try:
        status = target.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UsageError(f"-o {target}: {error.strerror or error}") from error
    for is_one, what in _NO_TARGETS:
        if is_one(status.st_mode):
            raise UsageError(f"-o {target} is {what}; name a file")
    # Nobody may write to a file of which the mode says so, root neither: its owner wants it kept.
    if not (status.st_mode & 0o222 and os.access(target, os.W_OK)):
        raise UsageError(f"-o {target} is read-only; name another file, or allow it by chmod u+w")
    return status


def _is_same(kept: str | Path, target: Path | None, target_status: os.stat_result | None) -> bool:
    """True where a kept file is what the target is or would become."""
    status = _status(kept)
    if status is not None and target_status is not None:
        return os.path.samestat(target_status, status)
    if status is not None or target is None or kept == "-":
        return False
    return os.path.realpath(target) == os.path.realpath(kept)


def _status(kept: str | Path) -> os.stat_result | None:
    try:
        return os.fstat(sys.stdin.fileno()) if kept == "-" and sys.stdin is not None else os.stat(kept)
    except (OSError, ValueError):  # it is not there, or nothing that has a name
        return None


def _try_folder(target: Path) -> None:
    """Makes a file beside the target and removes it: rights, quotas and read-only disks may all refuse it."""
    folder = Path(os.path.realpath(target)).parent
    if not folder.is_dir():
        raise UsageError(f"-o {target}: there is no folder {folder}; make it first, or name another")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"-o {target}: the folder {folder} takes no file: {error.strerror or error}") from error


@contextmanager
def _beside(path: Path, binary: bool) -> Iterator[IO[Any]]:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:_NAME_LENGTH]}.")
    try:
        with _opened(descriptor, binary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _keep_owner_and_mode(path, temporary)
        failpoint("export.replaced")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _opened(file: Path | int, binary: bool) -> IO[Any]:
    return open(file, "wb") if binary else open(file, "w", encoding="utf-8", newline="")


def _keep_owner_and_mode(path: Path, temporary: str) -> None:
    """A temporary file is private; its successor has the mode that the file had, or a new file would have."""
    if path.exists():
        before = path.stat()
        mode = before.st_mode & 0o777
        with suppress(PermissionError):  # root alone gives files to others
            os.chown(temporary, before.st_uid, before.st_gid)
    else:
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o666 & ~mask
    os.chmod(temporary, mode)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
