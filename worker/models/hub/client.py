"""The Hugging Face Hub and its cache on this machine: listings of repositories, and downloads of their files.

Owns every request to the Hub, its timeout, and the order of writing: a branch's name is written down when all of its
files are here, so that a fetch that broke off leaves the files that were there before. The files' layout is
huggingface_hub's. It does not know which files a model needs.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    parse_local_safetensors_file_metadata,
    parse_safetensors_file_metadata,
    resolve_revision,
    try_to_load_from_cache,
)
from huggingface_hub.errors import RevisionResolutionError, SafetensorsParsingError
from huggingface_hub.file_download import repo_folder_name

from batchmill.jobs.errors import ModelError
from batchmill.jobs.runtime.files.locks import held_by
from batchmill.jobs.runtime.sizes import size
from batchmill.jobs.runtime.waiting import telling
from batchmill.worker.models.hub.errors import pull_command, translated

#: A download writes all the time; one that has not for so long has no process any more, and nothing resumes it.
_ABANDONED_SECONDS = 3600.0
_HEADERS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository."""

    bytes: int
    #: The name of its content in the cache.
    blob: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at one commit."""

    name: str
    #: The revision that was asked for, None for the default branch.
    revision: str | None
    commit: str
    #: By name, with the folders in it.
    files: Mapping[str, RemoteFile]


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as a safetensors header describes it."""

    #: Such as BF16.
    dtype: str
    shape: tuple[int, ...]
    #: Its bytes in the file.
    bytes: int


def look_up(name: str, revision: str | None) -> Listing:
    """Lists a repository of the Hub as it is now: one request, answered within HF_HUB_ETAG_TIMEOUT (10 s by default).

    Raises ModelError, as HubUnreachable where nobody answered.
    """
    _quiet()
    with translated(name, revision):
        # Its default is to wait for ever.
        info = HfApi().model_info(
            name, revision=revision, timeout=float(constants.HF_HUB_ETAG_TIMEOUT), files_metadata=True
        )
    files = {
        each.rfilename: RemoteFile(each.size or 0, (each.lfs.sha256 if each.lfs else each.blob_id) or "")
        for each in info.siblings or ()
    }
    if info.sha is None:
        raise ModelError(f"cannot fetch {name}: what answers at the Hub's address names no commit; check HF_ENDPOINT")
    return Listing(name, revision, info.sha, files)


def cached_folder(name: str, revision: str | None) -> Path | None:
    """The folder of the cache for a repository at this revision as written, whole or not. No request goes out."""
    with translated(name, revision):
        try:
            commit = resolve_revision(name, revision=revision, local_files_only=True).resolved
        except RevisionResolutionError:
            return None
    folder = _repository(name) / "snapshots" / commit
    return folder if folder.is_dir() else None


def lacking(listing: Listing, names: Iterable[str]) -> list[str]:
    """Returns the names of files that are not in the cache, or not whole."""

    def is_here(name: str) -> bool:
        path = try_to_load_from_cache(listing.name, name, revision=listing.commit)
        # A mirror of the Hub may tell no sizes, which read as 0.
        listed_bytes = listing.files[name].bytes
        return isinstance(path, str) and (not listed_bytes or Path(path).stat().st_size == listed_bytes)

    return [name for name in names if not is_here(name)]


def fetch(listing: Listing, names: Iterable[str]) -> Path:
    """Brings the missing ones of these files into the cache, one after the other, and returns their folder.

    A connection that breaks is taken up where it broke; a file that is whole is never fetched again. One at a time
    and in this thread, so that Ctrl-C ends it at once. Raises ModelError, before any download where the disk is too
    small.
    """
    _quiet()
    folder = _repository(listing.name) / "snapshots" / listing.commit
    missing = lacking(listing, names)
    locks = Path(constants.HF_HUB_CACHE) / ".locks" / _repository(listing.name).name

    def locked_by() -> str | None:
        return held_by(locks.glob("*.lock"))

    _refuse_small_disk(listing, missing)
    with translated(listing.name, listing.revision):
        _remove_abandoned(_repository(listing.name) / "blobs")
        for name in missing:
            # A file that is here and not whole is replaced; without this it would be taken as it is.
            broken = (folder / name).exists()
            with telling(f"the file {name} of {listing.name}", holder=locked_by, is_certain=False):
                hf_hub_download(listing.name, name, revision=listing.commit, force_download=broken)
    return folder


def remember(listing: Listing) -> None:
    """Writes down the commit of this revision, so that it is found without a network. Called last, when all is here."""
    written = listing.revision or constants.DEFAULT_REVISION
    file = _repository(listing.name) / "refs" / written
    if written == listing.commit or (file.is_file() and file.read_text() == listing.commit):
        return
    with translated(listing.name, listing.revision):
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        beside.write_text(listing.commit)
        beside.replace(file)


def remote_headers(listing: Listing, names: Iterable[str]) -> dict[str, TensorHeader]:
    """Fetches the headers of these safetensors files, and nothing else of them. Raises ModelError."""

    def read(name: str) -> dict[str, TensorHeader]:
        return _headers(parse_safetensors_file_metadata(listing.name, name, revision=listing.commit).tensors)

    with translated(listing.name, listing.revision), ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
        return {tensor: header for headers in pool.map(read, names) for tensor, header in headers.items()}


def local_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """Reads the headers of these safetensors files. Raises ModelError."""
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        try:
            tensors |= _headers(parse_local_safetensors_file_metadata(file).tensors)
        except (SafetensorsParsingError, OSError):
            raise ModelError(f"{file} has no safetensors header; copy or fetch it again") from None
    return tensors


def _headers(tensors: Mapping[str, Any]) -> dict[str, TensorHeader]:
    return {
        name: TensorHeader(each.dtype, tuple(each.shape), each.data_offsets[1] - each.data_offsets[0])
        for name, each in tensors.items()
    }


def _quiet() -> None:
    """Silences huggingface_hub: `errors` explains its errors, and its warnings name addresses that grant access."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _repository(name: str) -> Path:
    """The folder of a repository in the cache: `blobs`, `snapshots` that link to them, and `refs`."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")


def _refuse_small_disk(listing: Listing, missing: list[str]) -> None:
    blobs = _repository(listing.name) / "blobs"
    needed = {each.blob: each.bytes for each in map(listing.files.__getitem__, missing)}
    bytes_ = sum(each for blob, each in needed.items() if not (blobs / blob).is_file())
    place = next(each for each in (blobs, *blobs.parents) if each.exists())
    free_bytes = shutil.disk_usage(place).free
    if bytes_ > free_bytes:
        raise ModelError(
            f"cannot fetch {listing.name}: {size(bytes_)} are to come, and {constants.HF_HUB_CACHE} has "
            f"{size(free_bytes)} left; free some, or set HF_HOME to a folder on a larger disk, and run "
            f"`{pull_command(listing.name, listing.revision)}`"
        )


def _remove_abandoned(blobs: Path) -> None:
    """Removes the unfinished files of processes that died while they fetched: no later one takes them up."""
    for file in blobs.glob("*.incomplete"):
        if time.time() - file.stat().st_mtime > _ABANDONED_SECONDS:
            file.unlink(missing_ok=True)
