"""Plans the next micro-batch: the waiting requests that run together, by plain arithmetic on their sizes.

Owns the rules of a micro-batch. It knows no request, no tensor and no device: sizes go in, places in the queue
come out.

The oldest waiting request is in every micro-batch, which is built around it; so a queue of n requests is empty
after at most n micro-batches, whatever keeps arriving. The others join by the distance of their prompt length from
the oldest one's, nearest first, as long as

- rows: there are at most `rows` of them;
- padding: the prompts, padded to the longest, take at most PADDING times the tokens that they have;
- idling: no max_tokens is below 1/IDLING of the largest, so that a row which ends at its limit waits for its
  neighbours during that part of the steps at most;
- tokens: the padded prompts and all that may be generated fit into `tokens` places of the cache. The oldest request
  alone is always let through: the device decides about it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

#: Padded prompt tokens for each real one, at most.
PADDING = 1.25
#: Prompts shorter than this count as this long: among them padding costs next to nothing.
SHORT_PROMPT_TOKENS = 16
#: The largest max_tokens of a micro-batch over its smallest, at most.
IDLING = 2
#: A max_tokens below this counts as this much, so that short answers of all lengths run together.
SHORT_ANSWER_TOKENS = 32


class RequestTokens(NamedTuple):
    """The size of a request, in tokens."""

    prompt: int
    answer: int  #: max_tokens: a bound, since nobody knows where the model will end


class Plan(NamedTuple):
    """The next micro-batch: places in the queue, oldest first, and the cache places that it may take."""

    places: tuple[int, ...]
    tokens: int


class _Sums(NamedTuple):
    """The sizes of the requests chosen so far, as the rules need them."""

    rows: int = 0
    prompts: int = 0  #: the sum of their prompt tokens
    longest: int = 0  #: the longest prompt
    least: int = sys.maxsize  #: the smallest max_tokens
    most: int = 0  #: the largest max_tokens

    def joined_by(self, size: RequestTokens) -> _Sums:
        prompt = max(size.prompt, SHORT_PROMPT_TOKENS)
        answer = max(size.answer, SHORT_ANSWER_TOKENS)
        return _Sums(
            self.rows + 1,
            self.prompts + prompt,
            max(self.longest, prompt),
            min(self.least, answer),
            max(self.most, answer),
        )

    @property
    def tokens(self) -> int:
        return self.rows * (self.longest + self.most)

    def allowed(self, tokens: int) -> bool:
        padding = self.rows * self.longest <= PADDING * self.prompts
        return padding and self.most <= IDLING * self.least and self.tokens <= tokens


def plan(queue: Sequence[RequestTokens], *, rows: int, tokens: int) -> Plan:
    """Plans the next micro-batch of a queue that is not empty; `queue[0]` is its oldest request."""
    oldest = queue[0]
    nearest_first = sorted(range(1, len(queue)), key=lambda place: abs(queue[place].prompt - oldest.prompt))
    sums, places = _Sums().joined_by(oldest), [0]
    for place in nearest_first:
        if sums.rows == rows:
            break
        larger = sums.joined_by(queue[place])
        if larger.allowed(tokens):
            sums = larger
            places.append(place)
    return Plan(tuple(sorted(places)), sums.tokens)
