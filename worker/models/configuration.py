"""A model folder's config.json as transformers reads it, without the keys that name other code to run the model by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig


def read_configuration(folder: Path) -> PreTrainedConfig:
    """Reads the configuration of a folder that was vetted, by transformers' own class. The folder stays as it is.

    It leaves out `auto_map`, and the attention implementation: transformers chooses that by what is installed here.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    for each in _parts(config):
        vars(each).pop("auto_map", None)
        each._attn_implementation_internal = None
    return config


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from _parts(part)
