"""A ModelSpec becomes a model and a tokenizer on a device: transformers' loading, bitsandbytes' quantization.

Owns how a model is fetched and loaded, and what its checkpoint asks of a sampler; whatever goes wrong becomes one
ModelError. What may be loaded at all is worker.vetting's; this module knows no request and no engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import has_avx512bf16
from huggingface_hub import errors as hub_errors
from huggingface_hub import resolve_revision, snapshot_download
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from jobs.errors import ModelError
from jobs.quantization import Kind
from jobs.schema import SamplingParams
from jobs.spec import DEMO, ModelSpec
from worker.devices import is_out_of_memory
from worker.telemetry import MemoryReader
from worker.vetting import WEIGHTS, WEIGHTS_INDEX, Refusal, shard_names, vet

DEMO_FOLDER = Path(__file__).parent / "demo" / "model"
#: What is fetched of a model beside its weights: configuration, vocabularies and chat templates.
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
#: A foreign error is told in so many characters of its first line.
ERROR_LENGTH = 300


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
        raise ModelError(f"cannot load {spec}: {_reason(error)}") from error


def _quiet() -> None:
    """Keeps out of the log what these libraries say of the normal course of things."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    for name in ("bitsandbytes", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _load(spec: ModelSpec, device: torch.device, started: float) -> LoadedModel:
    folder, commit = _fetched(spec) if spec.model != DEMO and spec.folder is None else (_folder(spec), None)
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
        **_precision(spec, config, device),
    )
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    weights_bytes = MemoryReader(str(device)).read().allocated
    asked, model.generation_config = model.generation_config, GenerationConfig()
    end_token_ids = _end_token_ids(asked, tokenizer)
    vocabulary = model.get_input_embeddings().num_embeddings
    return LoadedModel(
        spec,
        model,
        tokenizer,
        device,
        _defaults(asked),
        end_token_ids,
        _pad_token_id(tokenizer, end_token_ids, vocabulary),
        getattr(config.get_text_config(), "max_position_embeddings", None),
        vocabulary,
        _warm_up(model, device),
        weights_bytes,
        time.monotonic() - started,
        commit,
    )


def _folder(spec: ModelSpec) -> Path:
    """The folder that this spec names, or the bundled one."""
    folder = DEMO_FOLDER if spec.model == DEMO else spec.folder
    if folder is None or not folder.is_dir():
        remedy = "make it with `make demo-model`" if spec.model == DEMO else "copy the model there"
        raise ModelError(f"cannot load {spec}: there is no folder {folder} on this machine; {remedy}")
    return folder


def _fetched(spec: ModelSpec) -> tuple[Path, str]:
    """The folder of the Hub's cache that holds this model, and its commit; what is missing there is fetched.

    Of a repository only safetensors, configuration and vocabularies come to this machine: no pickles, no code, and
    of weights that it holds in several forms just the one that is loaded.
    """
    revision = resolve_revision(spec.model, revision=spec.revision)

    def fetch(*names: str) -> Path:
        return Path(
            snapshot_download(
                spec.model, revision=revision.resolved, allow_patterns=list(names), ignore_patterns=["*/*"]
            )
        )

    folder = fetch(*_SMALL_FILES)
    index = folder / WEIGHTS_INDEX
    fetch(*(shard_names(index) if index.is_file() else [WEIGHTS]))
    return folder, revision.resolved


def _precision(spec: ModelSpec, config: Any, device: torch.device) -> dict[str, Any]:
    """The dtype of what is not quantized, and how the rest is.

    A CPU computes in float32, but around 4-bit weights in bfloat16 where its products of them do. On CUDA an
    unquantized model keeps its checkpoint's dtype, and a quantized one has bfloat16 around its weights, or float16
    where the GPU has no bfloat16.
    """
    written = getattr(config, "quantization_config", None)
    if device.type == "cpu":
        fused = spec.quantization.four_bit and has_avx512bf16()
        half = torch.bfloat16 if fused else torch.float32
    else:
        half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if spec.quantization.kind is Kind.NONE:
        return {"dtype": half if device.type == "cpu" else "auto"}
    if written is not None:
        method = written.get("quant_method", "unknown") if isinstance(written, dict) else written.quant_method
        raise ModelError(
            f"cannot load {spec}: its checkpoint is quantized already ({method}); take it as it is with -q none"
        )
    if spec.quantization.kind is Kind.INT8:
        eight_bit = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=spec.quantization.threshold)
        return {"dtype": half, "quantization_config": eight_bit}
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quantization.kind.value,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=half,
    )
    return {"dtype": half, "quantization_config": four_bit}


def _defaults(asked: GenerationConfig) -> SamplingParams:
    """What the checkpoint's generation_config sets (transformers keeps None for what it does not).

    Where it says do_sample false and gives no temperature, its authors ask for the greedy answer. A do_sample that is
    absent asks for nothing, and one beside a temperature neither: such files are older than that rule.
    """
    temperature = asked.temperature
    if temperature is None and asked.do_sample is False:
        temperature = 0.0
    return SamplingParams(
        temperature=temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        repetition_penalty=asked.repetition_penalty,
    )


def _end_token_ids(asked: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every end token of the generation_config, and the tokenizer's."""
    written = asked.eos_token_id
    ids = list(written) if isinstance(written, list) else [written]
    return tuple(dict.fromkeys(each for each in [*ids, tokenizer.eos_token_id] if each is not None))


def _pad_token_id(tokenizer: PreTrainedTokenizerBase, end_token_ids: tuple[int, ...], vocabulary: int) -> int:
    """The tokenizer's pad token, or else an end token. Some tokenizers have one that their model does not know."""
    candidates = (tokenizer.pad_token_id, *end_token_ids)
    return next((each for each in candidates if each is not None and each < vocabulary), 0)


@torch.no_grad()
def _warm_up(model: PreTrainedModel, device: torch.device) -> int:
    """One forward of one token, since bitsandbytes repacks 4-bit weights in it on a CPU. Returns its cache's bytes."""
    output = model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=True)
    layers = getattr(output.get("past_key_values"), "layers", ())
    held = (each for layer in layers for each in vars(layer).values() if isinstance(each, torch.Tensor))
    return max(1, sum(each.nbytes for each in held))


def _reason(error: Exception) -> str:
    """One line: what went wrong, and what to do."""
    chain = list(_chain(error))
    for kinds, reason in _REASONS:
        if any(isinstance(each, kinds) for each in chain):
            return reason
    if any(is_out_of_memory(each) for each in chain):
        return "the device has not enough memory for it; use -q nf4, a smaller model or a larger device"
    said = str(error)
    for words, reason in _SAYINGS:
        if words in said:
            return reason
    first = next((line for line in said.splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first.strip()[:ERROR_LENGTH]}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_UNREACHABLE = (
    "the Hugging Face Hub cannot be reached and the model is not in the cache; "
    "check the network and HF_HUB_OFFLINE, or name a folder"
)
_REASONS: tuple[tuple[tuple[type[Exception], ...], str], ...] = (
    ((hub_errors.GatedRepoError,), "it is gated; accept its terms on huggingface.co and set HF_TOKEN"),
    (
        (hub_errors.RepositoryNotFoundError,),
        "the Hub has no such model; check its name, or set HF_TOKEN",
    ),
    ((hub_errors.RevisionNotFoundError,), "the Hub has no such revision of it; check --revision"),
    (
        (hub_errors.RevisionResolutionError, hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled),
        _UNREACHABLE,
    ),
)
_SAYINGS = (
    ("trust_remote_code", "it needs code of its own, which is never run; choose a model that transformers knows"),
    (
        "does not recognize this architecture",
        f"transformers {version('transformers')} does not know its architecture; install a newer one",
    ),
    ("Unrecognized configuration class", "it is no model that continues a text; choose a causal language model"),
)
