"""The versions of batchmill and of the libraries that compute, as the store keeps them with what was computed."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from batchmill.jobs import VERSION

_LIBRARIES = ("torch", "transformers", "bitsandbytes", "accelerate", "peft")


def versions() -> dict[str, str]:
    """Returns the versions by name, without libraries that are not installed."""
    installed = {"batchmill": VERSION}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed
