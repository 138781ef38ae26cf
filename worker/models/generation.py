"""The generation options of a checkpoint: sampling, end tokens, a token to pad with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from batchmill.jobs.requests.generation import SamplingParams


def defaults(config: GenerationConfig) -> SamplingParams:
    """The options that the checkpoint's generation_config sets (transformers keeps None for the others).

    With do_sample false, its authors ask for the greedy answer, whatever temperature stands beside it. A do_sample that
    is absent asks for nothing.
    """
    temperature = 0.0 if config.do_sample is False else config.temperature
    return SamplingParams(
        temperature=temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        repetition_penalty=config.repetition_penalty,
    )


def end_token_ids(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every end token of the generation_config, and the tokenizer's."""
    written = config.eos_token_id
    ids = list(written) if isinstance(written, list) else [written]
    return tuple(dict.fromkeys(each for each in [*ids, tokenizer.eos_token_id] if each is not None))


def pad_token_id(
    tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...], embeddings: Any, *, device: torch.device
) -> int:
    """Chooses the tokenizer's pad token, or else an end token.

    Some tokenizers have a pad token that their model does not know, and some models have a NaN for one that they were
    never trained on. A mask does not hide a NaN: it times 0 is NaN.
    """
    known = [each for each in (tokenizer.pad_token_id, *ends) if each is not None and each < embeddings.num_embeddings]
    with torch.inference_mode():
        sound = [each for each in known if embeddings(torch.tensor([each], device=device)).isfinite().all()]
    return next(iter(sound), 0)
