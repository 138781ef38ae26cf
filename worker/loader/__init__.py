"""A ModelSpec becomes a model and a tokenizer on a device: transformers' loading, bitsandbytes' quantization.

Owns the order in which a model is found, looked over, loaded and warmed; whatever goes wrong becomes one ModelError.
What may be loaded at all is worker.vetting's; this module knows no request and no engine.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from jobs.errors import ModelError
from jobs.schema import SamplingParams
from jobs.spec import ModelSpec
from worker.loader.generation import defaults, end_token_ids, pad_token_id
from worker.loader.precision import precision
from worker.loader.reasons import reason
from worker.loader.source import find
from worker.telemetry import MemoryReader
from worker.vetting import Refusal, vet


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to generate, and what an engine needs to know of it.

    `model.generation_config` is empty: what the checkpoint's said is in `defaults` and `end_token_ids`.
    `pad_token_id` has an embedding and is masked wherever it stands. `context_tokens`: prompt and answer together,
    None for no limit. `vocabulary`: tokens that have an embedding. `cache_token_bytes`: what one token takes in the
    cache. `weights_bytes` was read after loading and before the first forward. `commit`: what the revision resolved
    to, None for a folder.
    """

    spec: ModelSpec
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    defaults: SamplingParams
    end_token_ids: tuple[int, ...]
    pad_token_id: int
    context_tokens: int | None
    vocabulary: int
    cache_token_bytes: int
    weights_bytes: int
    load_seconds: float
    commit: str | None


def load(spec: ModelSpec, device: str) -> LoadedModel:
    """Loads a model onto `cpu` or `cuda:N`. Raises ModelError, which says what to do."""
    started = time.monotonic()
    _quiet()
    try:
        return _load(spec, torch.device(device), started)
    except ModelError:
        raise
    except Refusal as error:
        raise ModelError(f"cannot load {spec}: {error}") from None
    except Exception as error:
        # The gateway of four libraries, whose errors have nothing in common.
        raise ModelError(f"cannot load {spec}: {reason(error)}") from error


def _quiet() -> None:
    """Keeps out of the log what these libraries say of the normal course of things."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    for name in ("bitsandbytes", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _load(spec: ModelSpec, device: torch.device, started: float) -> LoadedModel:
    folder, commit = find(spec)
    vet(folder)
    source = str(folder)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        device_map={"": device},
        **precision(spec, config, device),
    )
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    weights_bytes = MemoryReader(str(device)).read().allocated
    asked, model.generation_config = model.generation_config, GenerationConfig()
    ends = end_token_ids(asked, tokenizer)
    vocabulary = model.get_input_embeddings().num_embeddings
    return LoadedModel(
        spec,
        model,
        tokenizer,
        device,
        defaults(asked),
        ends,
        pad_token_id(tokenizer, ends, vocabulary),
        getattr(config.get_text_config(), "max_position_embeddings", None),
        vocabulary,
        _warm_up(model, device),
        weights_bytes,
        time.monotonic() - started,
        commit,
    )


@torch.no_grad()
def _warm_up(model: PreTrainedModel, device: torch.device) -> int:
    """One forward of one token, since bitsandbytes repacks 4-bit weights in it on a CPU. Returns its cache's bytes."""
    output = model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=True)
    layers = getattr(output.get("past_key_values"), "layers", ())
    held = (each for layer in layers for each in vars(layer).values() if isinstance(each, torch.Tensor))
    return max(1, sum(each.nbytes for each in held))
