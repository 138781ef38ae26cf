"""batchmill.toml of the current folder: the check of its owner and its mode, and the values in it.

It can lead a command to servers and folders, so it is read only if nobody but the user, or root, can have written it.
"""

from __future__ import annotations

import os
import pwd
import stat
import tomllib
from pathlib import Path
from typing import Any

from batchmill.jobs.errors import SettingsError

TOML_FILE = "batchmill.toml"
#: A settings file has some lines of text.
_MOST_BYTES = 16 * 1024
_ROOT = 0


def read_settings_file(path: Path) -> dict[str, Any]:
    """The values in the file, unchecked; none if there is no file. Raises SettingsError."""
    try:
        link = os.lstat(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SettingsError(f"{TOML_FILE} cannot be read: {error.strerror}") from None
    _refuse_owner(link, path)
    return _parsed(_content(path))


def _content(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise SettingsError(f"{path} is not a file: remove it, or start in another folder")
            _refuse_owner(status, path)
            _refuse_writers(status, path)
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}; fix it, or start in another folder") from None
    if len(content) > _MOST_BYTES:
        raise SettingsError(f"{path} has more than {_MOST_BYTES:,} bytes, which no settings have")
    return content


def _open_at_once(path: str, flags: int) -> int:
    """Opens without waiting: a pipe of this name would wait for somebody who writes."""
    return os.open(path, flags | os.O_NONBLOCK)


def _refuse_owner(status: os.stat_result, path: Path) -> None:
    if status.st_uid not in (_ROOT, os.geteuid()):
        raise SettingsError(
            f"{path} belongs to {_name(status.st_uid)}, and may name servers of theirs: if you trust what it says, "
            f"run `chown {_name(os.geteuid())} {path}`, else start in another folder"
        )


def _refuse_writers(status: os.stat_result, path: Path) -> None:
    """Refuses a file that others may write; the user's own primary group is not another."""
    if status.st_mode & stat.S_IWOTH:
        raise SettingsError(f"everybody may write {path}: look what it says, and run `chmod go-w {path}`")
    if status.st_mode & stat.S_IWGRP and status.st_gid != _own_group():
        raise SettingsError(f"a group may write {path}: look what it says, and run `chmod g-w {path}`")


def _own_group() -> int:
    try:
        return pwd.getpwuid(os.geteuid()).pw_gid
    except KeyError:  # a container may give a process a number that has no name
        return os.getegid()


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        written = tomllib.loads(content.decode())
    except RecursionError:
        raise SettingsError(f"{TOML_FILE}: it is nested too deeply") from None
    except ValueError as error:  # bad UTF-8, bad TOML, endless digits
        raise SettingsError(f"{TOML_FILE}: {error}") from None
    for name, value in written.items():
        if isinstance(value, str) and any(ord(character) < ord(" ") for character in value):
            raise SettingsError(f"{TOML_FILE}: {name}: no setting holds control characters")
    return {name.lower(): value for name, value in written.items()}
