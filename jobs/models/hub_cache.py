"""Models in this machine's cache of the Hugging Face Hub, and their commits.

It reads names alone, and needs no huggingface_hub: a machine that submits jobs may not have it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from batchmill.jobs.models.spec import DEMO, ECHO

_COMMIT = re.compile(r"[0-9a-f]{40}")
_DEFAULT_REVISION = "main"


def cached_commit(name: str, revision: str | None) -> str | None:
    """The commit of this revision, as written, on this machine; None where the cache does not have it."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    ref = _cache() / f"models--{name.replace('/', '--')}" / "refs" / (revision or _DEFAULT_REVISION)
    try:
        return ref.read_text().strip() or None
    except (OSError, ValueError):
        return None


def cached_names() -> tuple[str, ...]:
    """The models of which this machine's cache has a folder."""
    try:
        folders = sorted(each.name for each in _cache().glob("models--*"))
    except OSError:
        return ()
    return tuple(each.removeprefix("models--").replace("--", "/") for each in folders)


def known_names(beginning: str) -> list[str]:
    """The models whose names begin so and that need no download, `demo` and `echo` among them."""
    return [each for each in (DEMO, ECHO, *cached_names()) if each.startswith(beginning)]


def _cache() -> Path:
    """The folder of the cache, found as huggingface_hub finds it."""
    written = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if written is None:
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
        written = os.path.join(home, "hub")
    return Path(os.path.expandvars(written)).expanduser()
