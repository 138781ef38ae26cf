"""Turns a GenerationRequest into a Prompt, and the tokens that answer it into a Choice.

Owns special tokens, the model's context, stop strings and the end of an answer. It knows no device and no batch; a
refusal is of one request alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from batchmill.jobs.requests.generation import Choice, GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import ErrorCode
from batchmill.worker.engine.refused import Refused
from batchmill.worker.engine.text.chat.chat_template import ChatTemplate
from batchmill.worker.engine.text.decoding import CONTEXT_TOKENS, Decoding
from batchmill.worker.engine.text.tool_calls import Calls

if TYPE_CHECKING:
    from batchmill.worker.models.load import LoadedModel


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as the device sees it."""

    tokens: Sequence[int]
    #: The request's own, shortened to the rest of the context.
    max_tokens: int
    sampling: SamplingParams
    #: The tokens that its answer continues as text.
    tail: Sequence[int]
    #: The model's, unless they are to be ignored, its stop strings that are special tokens, and its `stop_token_ids`.
    end_token_ids: frozenset[int]
    #: The other stop strings.
    stop: tuple[str, ...]
    #: The name of the adapter that answers it.
    adapter: str | None = None
    #: The names of the tools that its answer may call.
    tools: frozenset[str] = frozenset()


class Tokenization:
    """One tokenizer with the limits of its model.

    `vocabulary`: the number of tokens that the model has embeddings for.
    `context_tokens`: the most tokens of prompt and answer together, None for no limit.
    `end_token_ids`: the tokens that end every answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocabulary: int,
        context_tokens: int | None,
        end_token_ids: Collection[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._chat = ChatTemplate(tokenizer)
        self.decoding = Decoding(tokenizer)
        self._vocabulary = vocabulary
        self._context_tokens = context_tokens
        self._end_token_ids = frozenset(end_token_ids)
        #: Tokens that decoding leaves out, so that no text ever holds them: as stop strings they are end tokens.
        self._special = {str(each): number for number, each in tokenizer.added_tokens_decoder.items() if each.special}
        self._calls = Calls(tokenizer.chat_template)
        self._call_marks = {self._special[mark] for mark in self._calls.marks if mark in self._special}
        self._begin_token = _begin_token(tokenizer)

    @classmethod
    def of(cls, loaded: LoadedModel, *, context_tokens: int | None) -> Tokenization:
        """The tokenization of a loaded model, for prompts and answers of so many tokens together."""
        return cls(
            loaded.tokenizer,
            vocabulary=loaded.vocabulary,
            context_tokens=context_tokens,
            end_token_ids=loaded.end_token_ids,
        )

    def prompt(self, request: GenerationRequest) -> Prompt:
        """Makes the prompt of a request whose sampling has max_tokens set. Raises Refused."""
        if request.messages is not None:
            tokens, tail = self._tokens(self._chat.rendered(request), special=False), []
        else:
            tokens = self._tokens(request.prompt or "", special=True)
            tail = tokens[-CONTEXT_TOKENS:]
        sampling = request.sampling
        self._refuse_unknown_tokens(sampling)
        stop = sampling.stop or ()
        ends = {self._special[each] for each in stop if each in self._special}.union(sampling.stop_token_ids or ())
        return Prompt(
            tokens,
            self._max_tokens(len(tokens), sampling.max_tokens),
            sampling,
            tail,
            frozenset(ends) if sampling.ignore_eos else self._end_token_ids.union(ends),
            tuple(each for each in stop if each not in self._special),
            request.adapter,
            frozenset(each["function"]["name"] for each in request.tools or () if request.calls_tools),
        )

    def choice(self, prompt: Prompt, tokens: Sequence[int], *, named: str, complete: bool = False) -> Choice:
        """Makes the answer of these generated tokens, cut before its first stop string, with the calls in it.

        `named`: a name that no other answer has. `complete`: it ended because nothing could follow.
        """
        ended = tokens[-1] in prompt.end_token_ids
        answer = tokens[:-1] if ended else tokens
        text = self.decoding.text(answer, after=prompt.tail)
        stop = self.stop_place(prompt, tokens, text)
        choice = Choice(text[:stop], "stop" if ended or complete or stop is not None else "length")
        if not prompt.tools or not self._calls.known:
            return choice
        marked = self.decoding.text_with(self._call_marks, answer, after=prompt.tail)
        called = self._calls.of(marked[: self.stop_place(prompt, tokens, marked)], prompt.tools, named=named)
        return replace(choice, tool_calls=called.calls, content=called.content) if called else choice

    def stop_place(self, prompt: Prompt, tokens: Sequence[int], text: str) -> int | None:
        """Finds the first stop string that begins beyond the min_tokens, in this text of these tokens."""
        fewest = prompt.sampling.min_tokens or 0
        begin = len(self.decoding.text(tokens[:fewest], after=prompt.tail)) if fewest and prompt.stop else 0
        places = [place for place in (text.find(stop, begin) for stop in prompt.stop) if place >= 0]
        return min(places, default=None)

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        try:
            tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=special)
        except Exception as error:
            # A tokenizer has no errors of its own: a lone surrogate, say, raises whatever its language raises.
            raise Refused(ErrorCode.ENGINE_ERROR, f"the tokenizer failed: {type(error).__name__}") from error
        if special and self._begin_token is not None and tokens[:2] == [self._begin_token] * 2:
            del tokens[0]  # the prompt has it already
        if not tokens:
            raise Refused(ErrorCode.EMPTY_PROMPT, "the prompt has no tokens: write something into it")
        if max(tokens) >= self._vocabulary:
            raise Refused(
                ErrorCode.UNKNOWN_TOKEN,
                f"the tokenizer makes token {max(tokens)} of the prompt, and the model has {self._vocabulary}, counted "
                "from 0: leave its text out, or choose a model that has an embedding for it",
                prompt_tokens=len(tokens),
            )
        return tokens

    def _refuse_unknown_tokens(self, sampling: SamplingParams) -> None:
        named = {
            "logit_bias": [token for token, _ in sampling.logit_bias or ()],
            "stop_token_ids": sampling.stop_token_ids or (),
        }
        for option, tokens in named.items():
            if max(tokens, default=0) >= self._vocabulary:
                raise Refused(
                    ErrorCode.UNSUPPORTED_OPTION,
                    f"{option} names token {max(tokens)}, and the model has {self._vocabulary}, counted from 0",
                )

    def _max_tokens(self, prompt_tokens: int, wanted: int | None) -> int:
        assert wanted is not None, "the runner fills max_tokens in"
        if self._context_tokens is None:
            return wanted
        if prompt_tokens >= self._context_tokens:
            raise Refused(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {prompt_tokens} tokens, and the model takes {self._context_tokens} "
                "together with its answer: shorten the prompt",
                prompt_tokens=prompt_tokens,
            )
        return min(wanted, self._context_tokens - prompt_tokens)


def _begin_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that is put in front of plain text, None for none."""
    begun, bare = (tokenizer.encode("a", add_special_tokens=special) for special in (True, False))
    return begun[0] if begun[:1] != bare[:1] else None
