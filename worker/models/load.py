"""Loads a ModelSpec as a model and a tokenizer on a device: transformers' loading, bitsandbytes' quantization.

Owns the order in which a model is found, vetted, loaded and warmed up; whatever goes wrong becomes one ModelError.
worker.models.vetting decides what may be loaded at all; this module knows no request and no engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from batchmill.jobs.errors import ModelError
from batchmill.jobs.models.digests import Digests
from batchmill.jobs.models.identity import Content, of_commit, of_model
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.generation import SamplingParams
from batchmill.worker.devices.placement import Placement
from batchmill.worker.models.configuration import read_configuration
from batchmill.worker.models.generation import defaults, end_token_ids, pad_token_id
from batchmill.worker.models.layout import WHOLE, Layout, lay_out, settle
from batchmill.worker.models.loaded.cached import cache_token_bytes
from batchmill.worker.models.loaded.trial import refuse_without_numbers
from batchmill.worker.models.loaded.weights import bytes_by_device
from batchmill.worker.models.offload_folder import own_folder
from batchmill.worker.models.quantization.checkpoint import announce
from batchmill.worker.models.quantization.layers import finish, refuse_ignored, refuse_missing
from batchmill.worker.models.quantization.quantization_config import pretrained_arguments
from batchmill.worker.models.reasons import reason
from batchmill.worker.models.source import find
from batchmill.worker.models.vetting import Refusal, vet

if TYPE_CHECKING:
    from batchmill.worker.models.adapters.low_rank import LoadedAdapter

#: Raises ModelError or Refusal where the model in this folder is not to be loaded onto this device.
BeforeWeights = Callable[[ModelSpec, Path, torch.device], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to generate, and the facts about it that an engine needs."""

    spec: ModelSpec
    #: Its generation_config is empty: the checkpoint's is in `defaults` and `end_token_ids`.
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    #: The device that it lies on, or the first of its placement.
    device: torch.device
    #: The sampling options of the checkpoint's generation_config.
    defaults: SamplingParams
    end_token_ids: tuple[int, ...]
    #: It has an embedding, and is masked wherever it stands.
    pad_token_id: int
    #: The most tokens of prompt and answer together, None for no limit.
    context_tokens: int | None
    #: Tokens that have an embedding.
    vocabulary: int
    #: Bytes of one token in transformers' cache.
    cache_token_bytes: int
    #: Counted after loading and before the first forward, with its adapters.
    weights_bytes: int
    load_seconds: float
    #: The commit that the revision resolved to, None for a folder.
    commit: str | None
    #: The files that it was read from.
    content: Content
    #: The adapters beside it.
    adapters: tuple[LoadedAdapter, ...] = ()
    #: The places of its layers, if not all are on `device`.
    layout: Layout = WHOLE
    #: The part of `weights_bytes` on each of the placement's other devices.
    weights_elsewhere: tuple[int, ...] = ()


def load(
    spec: ModelSpec,
    device: str,
    *,
    placement: Placement | None = None,
    before_weights: BeforeWeights | None = None,
    digests: Digests | None = None,
) -> LoadedModel:
    """Loads a model onto `cpu` or `cuda:N`, or as a placement says whose first device this is.

    `before_weights`: called before weights are read onto one device. `digests`: the digests that are known of its
    files. Raises ModelError, which says what to do.
    """
    started = time.monotonic()
    with loading(spec):
        placement = placement or Placement((device,))
        return _load(spec, torch.device(device), placement, before_weights, digests or Digests(), started)


@contextmanager
def loading(spec: ModelSpec) -> Iterator[None]:
    """A context for everything that loads this model: keeps libraries quiet, and turns their errors into ModelError."""
    _quiet()
    try:
        yield
    except ModelError:
        raise
    except Refusal as error:
        raise ModelError(f"cannot load {spec}: {error}") from None
    except Exception as error:
        # The gateway of four libraries, whose errors have nothing in common.
        raise ModelError(f"cannot load {spec}: {reason(error)}") from error


def _quiet() -> None:
    """Keeps the libraries' messages about normal work out of the log, and sends the others there."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    for name in ("bitsandbytes", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("transformers", "huggingface_hub", "torch"):  # which write to stderr on their own
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def _load(
    spec: ModelSpec,
    device: torch.device,
    placement: Placement,
    before_weights: BeforeWeights | None,
    digests: Digests,
    started: float,
) -> LoadedModel:
    folder, commit = find(spec)
    vet(folder)
    source = str(folder)
    if placement.plain and before_weights is not None:
        before_weights(spec, folder, device)
    # Hashed first, so that the weights are in the operating system's memory when they are loaded.
    content = of_model(folder, digests) if commit is None else of_commit(commit)
    model = read_model(spec, folder, device, placement)
    config = model.config
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    refuse_changed(content)
    others = placement.names[1:]
    held = bytes_by_device(model)
    weights_bytes, *elsewhere = (held[torch.device(each)] for each in (str(device), *map(placement.seen, others)))
    generation_config, model.generation_config = model.generation_config, GenerationConfig()
    ends = end_token_ids(generation_config, tokenizer)
    vocabulary = model.get_input_embeddings().num_embeddings
    return LoadedModel(
        spec,
        model,
        tokenizer,
        device,
        defaults(generation_config),
        ends,
        pad_token_id(tokenizer, ends, model.get_input_embeddings(), device=device),
        getattr(config.get_text_config(), "max_position_embeddings", None),
        vocabulary,
        _warm_up(model, vocabulary, device),
        weights_bytes + sum(elsewhere),
        time.monotonic() - started,
        commit,
        content,
        layout=Layout.of(model),
        weights_elsewhere=tuple(elsewhere),
    )


def read_model(
    spec: ModelSpec, folder: Path, device: torch.device, placement: Placement | None = None
) -> PreTrainedModel:
    """Reads the model of a folder that was vetted, quantized as this spec has it; no forward has run yet.

    Raises ModelError, and whatever the libraries raise that load it.
    """
    source = str(folder)
    config = read_configuration(folder)
    placement = placement or Placement((str(device),))
    arguments = pretrained_arguments(spec, config, folder, device, offloads=placement.offloads)
    announce(config)
    model, loading_info = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        device_map=lay_out(placement, spec.quantization, config, arguments, device),
        offload_folder=own_folder(placement.offload_folder),
        **arguments,
    )
    settle(model)
    refuse_missing(loading_info["missing_keys"])
    finish(model, arguments["dtype"])
    loaded: PreTrainedModel = model
    return loaded


def refuse_changed(content: Content) -> None:
    """Raises Refusal where files were written while they were loaded: nobody knows which version was read."""
    changed = content.changed()
    if changed is not None:
        raise Refusal(f"its {changed} changed while it was loaded; start again when nobody writes to its files")


@torch.no_grad()
def _warm_up(model: PreTrainedModel, vocabulary: int, device: torch.device) -> int:
    """Runs a forward of one token, since bitsandbytes repacks 4-bit weights in it on a CPU, and one of a few.

    Returns the bytes of its cache.
    """
    token_bytes = cache_token_bytes(model, device)
    refuse_ignored(model)
    refuse_without_numbers(model, vocabulary, device)
    return token_bytes
