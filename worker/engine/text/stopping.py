"""The end of each row of a micro-batch: at an end token, a stop string, its own max_tokens, or without numbers.

Owns the ends of rows and their token counts. It knows no sampling and no queue, and chooses no token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from batchmill.worker.engine import Progress
from batchmill.worker.engine.text.tokenization import Prompt, Tokenization

#: A stop string is looked for in as many of the newest tokens as it has bytes, and these on top: each token writes
#: a byte at least, but for special ones, and the first ones may read otherwise without those before them.
MARGIN_TOKENS = 8


class RowStopping:
    """A stopping criterion: it ends the micro-batch when every row has ended, or when progress says so.

    A row that has ended is stepped on with the others; `counts` remembers where its answer ends.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenization: Tokenization,
        *,
        end_token_ids: Sequence[int],
        width: int,
        sound: torch.Tensor,
        progress: Progress,
    ) -> None:
        device = sound.device
        #: Rows whose logits were numbers so far, which others write; and rows that ended because they were none.
        self._sound, self.failed = sound, torch.zeros_like(sound)
        #: Tokens that each row's answer has, its end token included; 0 while it goes on. (rows,), on the device.
        self.counts = torch.zeros(len(prompts), dtype=torch.long, device=device)
        self._max_tokens = torch.tensor([each.max_tokens for each in prompts], device=device)
        self._end_token_ids = torch.tensor(end_token_ids, dtype=torch.long, device=device)
        self._width = width
        self._progress = progress
        ends = frozenset(end_token_ids)
        #: Rows that the model's end tokens end.
        self._ends_normally = torch.tensor([prompt.end_token_ids >= ends for prompt in prompts], device=device)
        self._watched = {
            row: StopWatch(prompt, tokenization)
            for row, prompt in enumerate(prompts)
            if prompt.stop or prompt.end_token_ids != ends
        }

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        """Takes the tokens so far (rows, width + generated). Returns the rows that need no more, (rows,) of bool."""
        generated = input_ids.shape[1] - self._width
        newest = input_ids[:, -1]
        ended = torch.isin(newest, self._end_token_ids) & self._ends_normally | (self._max_tokens <= generated)
        if self._watched:
            self._watch(newest, ended)
        self.failed |= (self.counts == 0) & ~self._sound
        ended |= self.failed
        self.counts = torch.where((self.counts == 0) & ended, generated, self.counts)
        if self._progress():
            return torch.ones_like(ended)
        return self.counts > 0

    def _watch(self, newest: torch.Tensor, ended: torch.Tensor) -> None:
        rows = list(self._watched)
        done = ended[rows].tolist()
        for row, token, over in zip(rows, newest[rows].tolist(), done, strict=True):
            if over:
                del self._watched[row]
            elif self._watched[row].ended_by(token):
                ended[row] = True
                del self._watched[row]


class StopWatch:
    """Looks for the stop strings of one row in its text, once it has its min_tokens."""

    def __init__(self, prompt: Prompt, tokenization: Tokenization) -> None:
        self._prompt, self._tokenization = prompt, tokenization
        self._tokens = list(prompt.tail)
        self._earliest = len(prompt.tail) + (prompt.sampling.min_tokens or 0)
        self._newest = max((len(each.encode()) for each in prompt.stop), default=0) + MARGIN_TOKENS

    def ended_by(self, token: int) -> bool:
        """Takes the next token. Returns True where the answer ends with it."""
        self._tokens.append(token)
        if len(self._tokens) < self._earliest:
            return False
        if token in self._prompt.end_token_ids:
            return True
        newest = self._tokenization.decoding.text(self._tokens[-self._newest :])
        if not any(stop in newest for stop in self._prompt.stop):
            return False
        # The newest tokens may read otherwise in the whole answer, which is what counts.
        answer = self._tokens[len(self._prompt.tail) :]
        text = self._tokenization.decoding.text(answer, after=self._prompt.tail)
        return self._tokenization.stop_place(self._prompt, answer, text) is not None
