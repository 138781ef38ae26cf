"""What a checkpoint asks of whoever generates with it: sampling, end tokens, a token to pad with."""

from __future__ import annotations

from transformers import GenerationConfig, PreTrainedTokenizerBase

from jobs.schema import SamplingParams


def defaults(asked: GenerationConfig) -> SamplingParams:
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


def end_token_ids(asked: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every end token of the generation_config, and the tokenizer's."""
    written = asked.eos_token_id
    ids = list(written) if isinstance(written, list) else [written]
    return tuple(dict.fromkeys(each for each in [*ids, tokenizer.eos_token_id] if each is not None))


def pad_token_id(tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...], vocabulary: int) -> int:
    """The tokenizer's pad token, or else an end token. Some tokenizers have one that their model does not know."""
    candidates = (tokenizer.pad_token_id, *ends)
    return next((each for each in candidates if each is not None and each < vocabulary), 0)
