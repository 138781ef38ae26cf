"""The mark by which a folder of a model is told from any other: a config.json."""

from __future__ import annotations

from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"


def no_model(folder: Path) -> str | None:
    """The reason why this folder is no model, and what to do; None where it may be one. Raises OSError."""
    if (folder / "config.json").is_file():
        return None
    remedy = f"it is an adapter: serve it with --adapter NAME={folder} over its base"
    named = remedy if (folder / ADAPTER_CONFIG).is_file() else "name the folder of a transformers model"
    return f"{folder} is no model: it holds no config.json; {named}"
