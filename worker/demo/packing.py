"""Training rows of a fixed length: examples written as conversations or plain text, several to a row.

Owns how an example looks to the model and what part of it is learnt (the answer and its end). Examples in
one row cannot see each other; each starts at position 0.
"""

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from batchmill.worker.demo import corpus
from batchmill.worker.demo.tokenizer import ASSISTANT, BOS, END, SYSTEM, USER

NOT_LEARNT = -100
PLAIN_SHARE = 0.3
SYSTEM_SHARE = 0.35


@dataclass(frozen=True)
class Rows:
    """One training batch; every tensor is (rows, length_tokens) but `may_attend`."""

    tokens: torch.Tensor
    #: The token after each position, NOT_LEARNT outside answers.
    targets: torch.Tensor
    #: 1 / square root of the answer's tokens: a long answer counts for more than a short one, a little.
    weights: torch.Tensor
    positions: torch.Tensor
    #: (rows, 1, length, length), true where a token (third axis) sees another (fourth axis).
    may_attend: torch.Tensor


def chat_prompt(question: str, system: str | None = None) -> str:
    """The text that the chat template makes of a question, up to the beginning of the answer."""
    before = f"{SYSTEM}{system}{END}" if system is not None else ""
    return f"{BOS}{before}{USER}{question}{END}{ASSISTANT}"


def training_text(choose: random.Random, kind_weights: Mapping[str, int]) -> tuple[str, str]:
    """A random example as (prompt, answer); in plain text the answer follows after one space."""
    example = corpus.training_example(choose, kind_weights)
    if choose.random() < PLAIN_SHARE:
        return BOS + example.question, f" {example.answer}{END}"
    system = choose.choice(corpus.SYSTEM_MESSAGES) if choose.random() < SYSTEM_SHARE else None
    return chat_prompt(example.question, system), example.answer + END


def _encoded(
    tokenizer: PreTrainedTokenizerFast, choose: random.Random, first_examples: int
) -> Iterator[tuple[list[int], int]]:
    """Endless (tokens, how many of them are prompt), encoded a few hundred at a time for speed."""
    for number in itertools.count():
        weights = corpus.FIRST_KIND_WEIGHTS if number * 256 < first_examples else corpus.KIND_WEIGHTS
        pairs = [training_text(choose, weights) for _ in range(256)]
        encodings = tokenizer.backend_tokenizer.encode_batch(
            [part for pair in pairs for part in pair], add_special_tokens=False
        )
        for prompt, answer in zip(encodings[::2], encodings[1::2], strict=True):
            yield prompt.ids + answer.ids, len(prompt.ids)


def packed_rows(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, rows: int, length_tokens: int, first_examples: int
) -> Iterator[Rows]:
    """Endless batches of `rows` rows; the same seed gives the same batches."""
    encoded = _encoded(tokenizer, random.Random(seed), first_examples)
    examples = (example for example in encoded if len(example[0]) <= length_tokens)
    example = next(examples)
    earlier = torch.ones(length_tokens, length_tokens, dtype=torch.bool).tril()
    while True:
        shape = (rows, length_tokens)
        tokens = torch.full(shape, tokenizer.pad_token_id, dtype=torch.long)
        targets = torch.full(shape, NOT_LEARNT, dtype=torch.long)
        weights = torch.zeros(shape)
        positions = torch.zeros(shape, dtype=torch.long)
        owners = torch.zeros(shape, dtype=torch.long)
        for row in range(rows):
            start, owner = 0, 1
            while start + len(example[0]) <= length_tokens:
                ids, prompt_tokens = torch.tensor(example[0]), example[1]
                end = start + len(ids)
                tokens[row, start:end] = ids
                targets[row, start + prompt_tokens - 1 : end - 1] = ids[prompt_tokens:]
                weights[row, start + prompt_tokens - 1 : end - 1] = (len(ids) - prompt_tokens) ** -0.5
                positions[row, start:end] = torch.arange(len(ids))
                owners[row, start:end] = owner
                start, owner, example = end, owner + 1, next(examples)
        may_attend = earlier & (owners[:, None, :, None] == owners[:, None, None, :])
        yield Rows(tokens, targets, weights, positions, may_attend)
