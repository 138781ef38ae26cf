"""A folder of this process's own for weights that are offloaded to disk, within the one that its user named.

transformers reads most of them from the model's own files, and writes only those that it changed while loading.
"""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from batchmill.jobs.errors import ModelError
from batchmill.jobs.runtime.process.process import Lives, Process


def own_folder(folder: Path | None) -> str | None:
    """Makes the folder of this process, and deletes those of dead processes of this machine.

    Raises ModelError where it cannot be made.
    """
    if folder is None:
        return None
    prefix = f"batchmill-{socket.gethostname()}-"
    mine = folder / f"{prefix}{Process.own() or os.getpid()}"
    try:
        mine.mkdir(parents=True, exist_ok=True)
        for each in folder.glob(f"{prefix}*"):
            process = Process.parse(each.name.removeprefix(prefix))
            if process is not None and process.lives() is Lives.NO:
                shutil.rmtree(each, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"--offload-folder {folder} cannot be used: {error.strerror or error}") from error
    return str(mine)
