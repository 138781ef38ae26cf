"""Greedy answers of transformers' `generate`, as a reference for an engine, and how much of each is certain.

In 16 bits, and with LLM.int8()'s outliers, rounding depends on the other rows of a batch. Where two tokens are about as
likely, either may win; the answers have to agree up to there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import RequestKey
from batchmill.worker.engine import Engine
from batchmill.worker.engine.continuous.engine import ContinuousEngine
from tests.support.models.tiny import build_tokenizer

PROMPTS = ("a", "one two three", "to be, or not", "x" * 30)
ANSWER_TOKENS = 6
#: Two tokens are about as likely when their logits are no further apart than this part of a standard deviation.
ROUNDED = 0.1


@dataclass(frozen=True, slots=True)
class Greedy:
    """The answer to one prompt; `certain`: how it begins, before the first token that another is about as likely as."""

    text: str
    certain: str

    def holds(self, answer: str) -> bool:
        return answer == self.text if self.certain == self.text else answer.startswith(self.certain)


def greedy(model: PreTrainedModel, *, tolerance: float = 0.0) -> list[Greedy]:
    """Answers each prompt alone with `generate`. `tolerance`: 0 for exact, or ROUNDED."""
    tokenizer, found = build_tokenizer(), []
    for text in PROMPTS:
        ids = torch.tensor([tokenizer.encode(text)], device=model.device)
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=2,
            eos_token_id=1, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        tokens = said.sequences[0, ids.shape[1] :].tolist()
        narrow = [bool(_gap(each[0].float()) < tolerance) for each in said.logits]
        sure = tokens[: narrow.index(True)] if True in narrow else tokens
        whole, begin = (tokenizer.decode(each, skip_special_tokens=True) for each in (tokens, sure))
        found.append(Greedy(whole, begin if len(sure) == len(tokens) else begin.rstrip("\ufffd")))
    return found


def _gap(logits: torch.Tensor) -> torch.Tensor:
    """The distance between the two best logits, in standard deviations."""
    best = logits.topk(2).values
    return (best[0] - best[1]) / logits.std()


def answers(engine: Engine) -> list[str]:
    """Answers all prompts at once with an engine, greedily."""
    for index, text in enumerate(PROMPTS):
        sampling = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS)
        engine.add(RequestKey("job", index), GenerationRequest(index, str(index), prompt=text, sampling=sampling))
    outputs = []
    while engine.waiting or engine.active:
        outputs += engine.step()
    if isinstance(engine, ContinuousEngine):
        engine.close()
    return [each.payload[0].text for each in sorted(outputs, key=lambda each: each.key.index)]


def agree(found: Sequence[str], expected: Sequence[Greedy]) -> bool:
    return len(found) == len(expected) and all(each.holds(text) for text, each in zip(found, expected, strict=True))
