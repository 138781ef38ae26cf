"""A quantized copy of a model in a folder of its own, which `-q checkpoint` loads without quantizing it again.

Owns the kinds that can be saved, the files copied beside the weights, and a folder that is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel

from batchmill.jobs import VERSION
from batchmill.jobs.errors import ModelError, UsageError
from batchmill.jobs.models.quantization import Kind
from batchmill.jobs.models.spec import ECHO, ModelSpec
from batchmill.jobs.runtime.process.process import Process
from batchmill.worker.models.load import loading, read_model
from batchmill.worker.models.source import find
from batchmill.worker.models.vetting import COPY, COPY_FORMAT, WEIGHTS_INDEX, vet

_KINDS = (Kind.NF4, Kind.FP4, Kind.INT8)
#: Files beside the weights that are copied as they are: tokenizer, templates, generation options, licence.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "additional_chat_templates")
#: Files that are written anew instead.
_WRITTEN = frozenset({"config.json", WEIGHTS_INDEX, COPY})
#: Characters of the folder's name that go into that of the unfinished one beside it, of at most 255 bytes.
_NAME_LENGTH = 40
_GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class SavedCopy:
    """A quantized copy that was saved."""

    folder: Path
    #: Bytes of the safetensors files.
    weights_bytes: int
    #: Time of loading, quantizing and writing.
    seconds: float


def save_quantized(spec: ModelSpec, out: Path, device: str) -> SavedCopy:
    """Loads the model of this spec on `cpu` or `cuda:N`, and saves it quantized in `out`.

    `out` must not exist or be empty. It appears when all of it is written. Raises UsageError for a spec that cannot be
    saved and for a folder that cannot be used, and ModelError for a model that cannot be loaded.
    """
    started = time.monotonic()
    _refuse(spec, out)
    place = Path(os.path.realpath(out))
    unfinished = place.parent / f".{out.name[:_NAME_LENGTH]}.unfinished-{Process.own() or os.getpid()}"
    try:
        unfinished.mkdir(parents=True)  # before the long work, which would be for nothing where it cannot be made
        with loading(spec):
            folder, _ = find(spec)
            vet(folder)
            model = read_model(spec, folder, torch.device(device))
        _write(model, spec, unfinished)
        _copy(folder, unfinished)
        (unfinished / COPY).write_text(json.dumps({"format": COPY_FORMAT, "batchmill": VERSION}) + "\n")
        unfinished.rename(place)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot save a copy in {out}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    weights_bytes = sum(each.stat().st_size for each in out.glob("*.safetensors"))
    return SavedCopy(out, weights_bytes, time.monotonic() - started)


def _refuse(spec: ModelSpec, out: Path) -> None:
    """Raises UsageError."""
    if spec.model == ECHO:
        raise UsageError("echo holds no weights; name a model")
    if spec.quantization.kind not in _KINDS:
        raise UsageError(f"-q {spec.quantization} quantizes nothing; choose one of {', '.join(_KINDS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already and not an empty folder; name another")
    if spec.folder is not None and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(spec.folder)):
        raise UsageError(f"{out} lies in the model's own folder; name one elsewhere")


def _write(model: PreTrainedModel, spec: ModelSpec, folder: Path) -> None:
    """Writes weights and config.json, whose compute_dtype is as it was asked for: every device finds its own best."""
    written = model.config.quantization_config
    if spec.quantization.four_bit:
        written.bnb_4bit_compute_dtype = getattr(torch, spec.quantization.compute_dtype)
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    (folder / _GENERATION).unlink(missing_ok=True)


def _copy(source: Path, folder: Path) -> None:
    for pattern in _COPIED:
        for each in source.glob(pattern):
            if each.is_dir():
                shutil.copytree(each, folder / each.name)
            elif each.name not in _WRITTEN:
                shutil.copyfile(each, folder / each.name)
