"""Vets a model folder before anything of it is loaded, and says in one line what is wrong with it and why.

A model folder is data from strangers: its configuration can name code to fetch and run, its index files anywhere on
this machine, and a pickle runs code when it is read. Vetting reads names, keys and sizes, and no tensor. It knows which
files transformers reads of a folder, and loads nothing itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from batchmill.jobs.models.folder import ADAPTER_CONFIG, no_model

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS}.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
#: The file of a quantized copy that names the form in which it was saved; copies of older versions have none.
COPY = "batchmill.json"
COPY_FORMAT = 1
#: JSON files that are large and hold words of the model's, of which any may look like one of the keys below.
_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json"})
#: A key that names classes in code of the model's own, which is not needed where transformers has one of its own.
_CLASSES_KEY = "auto_map"
#: Keys that make transformers run code of the model's own, whatever trust_remote_code says.
_CODE_KEYS = frozenset({_CLASSES_KEY, "custom_pipelines", "trust_remote_code"})
#: Parts of keys that name code to compute attention and experts with, which may be a repository of the Hub.
_ATTENTION, _EXPERTS = "attn_implementation", "experts_implementation"
#: The attention implementations of transformers itself.
_OWN_ATTENTION = frozenset({"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"})
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
#: A key that names another file of weights.
_WEIGHTS_KEY = "transformers_weights"
_MOST_CONFIG_BYTES = 32 * 1024**2
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100 * 1024**2


class Refusal(Exception):
    """A folder that is not loaded; the text says what was found, why that is not loaded, and what to do."""


def vet(folder: Path) -> None:
    """Vets the files that transformers would read of this folder. Raises Refusal."""
    vet_configuration(folder)
    for file in weights(folder):
        _refuse_broken(file)


def vet_configuration(folder: Path) -> None:
    """Vets a folder of which no weights are read, and that may have none. Raises Refusal."""
    if (why := no_model(folder)) is not None:
        raise Refusal(why)
    if (folder / ADAPTER_CONFIG).exists():
        raise Refusal(
            f"{folder} holds {ADAPTER_CONFIG}: an adapter names another model to load, which nobody looked over; "
            "merge the two with peft's merge_and_unload, and save the result, or serve it with --adapter over its base"
        )
    for file in _files(folder):
        _stays_inside(file, folder)
    _refuse_newer(folder)
    known = _is_known(_read(folder / "config.json"))
    for file in _configurations(folder):
        _refuse_code(file, known=known)


def vet_adapter(folder: Path) -> dict[str, Any]:
    """Vets the files that are read of an adapter's folder: its configuration, which is returned, and its weights.

    Raises Refusal. Other files there, a base model or a training's pickles, are never read.
    """
    config, tensors = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    if not config.is_file():
        raise Refusal(f"{folder} holds no {ADAPTER_CONFIG}; name a folder that peft's save_pretrained wrote")
    if not tensors.is_file():
        raise Refusal(
            f"{folder} holds no {ADAPTER_WEIGHTS}, and other weights are not loaded, since a pickle can run code; "
            "save it with peft's save_pretrained"
        )
    for file in (config, tensors):
        _stays_inside(file, folder)
    _refuse_code(config)
    _refuse_broken(tensors)
    content = _read(config)
    if not isinstance(content, dict):
        raise Refusal(f"{ADAPTER_CONFIG} is no JSON object; copy or fetch it again")
    return content


def _refuse_newer(folder: Path) -> None:
    if not (folder / COPY).is_file():
        return
    written = _read(folder / COPY)
    if not isinstance(written, dict) or written.get("format") != COPY_FORMAT:
        raise Refusal(
            f"{folder} is a quantized copy in a form that this batchmill does not know; use the newer batchmill that "
            "saved it, or save it again"
        )


def weights(folder: Path) -> list[Path]:
    """Lists the files of weights that transformers takes. Raises Refusal unless all are there."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / WEIGHTS_INDEX).is_file():
        shards = sorted(file.name for file in folder.glob("*.safetensors") if _SHARD.search(file.name))
        if shards:
            raise Refusal(
                f"{folder} lacks {WEIGHTS_INDEX}, which says what each of its {len(shards)} files of weights holds "
                f"({shards[0]} ...); copy or fetch it again"
            )
        raise Refusal(
            f"{folder} holds no safetensors weights, and others are not loaded, since a pickle can run code; "
            "convert them with transformers' save_pretrained"
        )
    names = shard_names(folder / WEIGHTS_INDEX)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise Refusal(f"{folder} lacks {missing[0]}, which {WEIGHTS_INDEX} names; copy or fetch it again")
    return [folder / name for name in names]


def shard_names(index: Path) -> list[str]:
    """Reads the names of files in an index of weights. Raises Refusal when one is not a safetensors file beside it."""
    content = _read(index)
    mapping = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise Refusal(f"{index.name} has no weight_map; copy or fetch it again")
    names = sorted({str(name) for name in mapping.values()})
    for name in names:
        if PurePosixPath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise Refusal(
                f"{index.name} names the weights {name[:100]!r}, which is not a safetensors file beside it; "
                "files elsewhere are never read"
            )
    return names


def _files(folder: Path) -> Iterator[Path]:
    """Lists everything in the folder itself: of folders in it, transformers reads templates alone."""
    yield from sorted(folder.iterdir())
    yield from sorted(folder.glob("additional_chat_templates/*"))


def _stays_inside(file: Path, folder: Path) -> None:
    """Raises Refusal for a link out of the folder; the Hub's cache links from its snapshots to its blobs."""
    if not file.is_symlink():
        return
    home, target = folder.resolve(), file.resolve()
    in_cache = home.parent.name == "snapshots" and target.is_relative_to(home.parent.parent / "blobs")
    if not in_cache and not target.is_relative_to(home):
        raise Refusal(f"{file} is a link that leaves the folder; files elsewhere are never read: copy the file there")


def _configurations(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.glob("*.json")):
        if file.name not in _VOCABULARIES and not file.name.endswith(".index.json"):
            yield file


def _is_known(config: Any) -> bool:
    """True where transformers has a class of its own for this configuration."""
    # Imported here, since it takes long and few processes vet a folder.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    named = config.get("model_type") if isinstance(config, dict) else None
    return isinstance(named, str) and named in CONFIG_MAPPING_NAMES


def _refuse_code(file: Path, *, known: bool = False) -> None:
    """Raises Refusal for keys that name code; `known`: transformers has a class of its own for the model."""
    content = _read(file)
    if known and isinstance(content, dict):
        content.pop(_CLASSES_KEY, None)
    for key, value in _items(content):
        if key in _CODE_KEYS:
            raise Refusal(
                f"its {file.name} has {key}: it asks for code of its own, which is never run; choose a model that "
                f"transformers knows, or take {key} out of a copy if transformers can do without"
            )
        if _EXPERTS in key or (_ATTENTION in key and not _is_own_attention(value)):
            raise Refusal(
                f"its {file.name} has {key[:100]}: it can name code to fetch and run, which is never done; "
                "take the key out of a copy, and transformers chooses by itself"
            )
        if key == _WEIGHTS_KEY:
            raise Refusal(f"its {file.name} has {key}, and weights are read from {WEIGHTS} alone; rename them so")


def _is_own_attention(value: Any) -> bool:
    """True where this names no code: nothing, or an implementation of transformers', for all parts or for each."""
    if isinstance(value, dict):
        return all(map(_is_own_attention, value.values()))
    return value is None or isinstance(value, bool) or (isinstance(value, str) and value in _OWN_ATTENTION)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields every key at any depth, with its value."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case dict() as mapping:
                yield from mapping.items()
                waiting += mapping.values()
            case list() as values:
                waiting += values


def _read(file: Path) -> Any:
    """Reads a JSON file. Raises Refusal."""
    if file.stat().st_size > _MOST_CONFIG_BYTES:
        raise Refusal(f"{file.name} has more than {_MOST_CONFIG_BYTES // 1024**2} MiB, which no configuration has")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise Refusal(f"{file.name} is not JSON; copy or fetch it again") from None


def _refuse_broken(file: Path) -> None:
    """Compares a safetensors file's header with its size. Format: 8 bytes of length, JSON of that length, data."""
    size_bytes = file.stat().st_size
    with file.open("rb") as opened:
        header_bytes = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        if not 2 <= header_bytes <= min(_MOST_HEADER_BYTES, size_bytes - _LENGTH_BYTES):
            raise Refusal(f"{file.name} is not a safetensors file, or was cut off; copy or fetch it again")
        header = opened.read(header_bytes)
    try:
        tensors = json.loads(header)
        ends = [each["data_offsets"][1] for name, each in tensors.items() if name != "__metadata__"]
        expected_bytes = _LENGTH_BYTES + header_bytes + max(ends, default=0)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise Refusal(f"{file.name} has no safetensors header; copy or fetch it again") from None
    if expected_bytes != size_bytes:
        raise Refusal(
            f"{file.name} has {size_bytes:,} bytes and its safetensors header tells of {expected_bytes:,}; "
            "copy or fetch it again"
        )
