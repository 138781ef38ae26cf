"""A folder of this process's own for weights that wait on disk, within the one that its user named.

transformers reads most of them from the model's own files, and writes only those that it changed while loading.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from pathlib import Path

import psutil

from jobs.errors import ModelError

_NAME = re.compile(r"batchmill-(.+)-(\d+)")


def own_folder(folder: Path | None) -> str | None:
    """The folder of this process, made; what processes of this machine left there that have ended is deleted.

    Raises ModelError where it cannot be made.
    """
    if folder is None:
        return None
    host = socket.gethostname()
    mine = folder / f"batchmill-{host}-{os.getpid()}"
    try:
        mine.mkdir(parents=True, exist_ok=True)
        for each in folder.iterdir():
            found = _NAME.fullmatch(each.name)
            if found and found[1] == host and not psutil.pid_exists(int(found[2])):
                shutil.rmtree(each, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"--offload-folder {folder} cannot be used: {error.strerror or error}") from error
    return str(mine)
