"""Between text and tokens: a Request becomes a Prompt, and the tokens that answer it become a Choice.

Owns the chat template, special tokens, the model's context, stop strings and the end of an answer. It knows no
device and no batch; what it refuses, it refuses for one request alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from jobs.schema import Choice, ErrorCode, Request, SamplingParams

#: The end of a plain prompt that is decoded together with its answer: some tokenizers write a word's leading space
#: only where a word stands before it.
TAIL_TOKENS = 5
#: What `apply_chat_template` takes besides the template's own variables, and a request may not set.
RESERVED = frozenset(
    {
        "conversation",
        "chat_template",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)
#: A template's refusal is kept up to this length.
REFUSAL_LENGTH = 200


class Refused(Exception):
    """One request that cannot be answered; the text is for its user and holds nothing of the prompt."""

    def __init__(self, code: ErrorCode, message: str, *, prompt_tokens: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.prompt_tokens = prompt_tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as the device sees it.

    `max_tokens` is shortened to what the context leaves. `tail`: the tokens that its answer continues as text.
    `end_token_ids` are the model's, unless they are to be ignored, those of its stop strings that are special tokens,
    and its `stop_token_ids`; `stop` are the other stop strings. `adapter`: the name of the one that answers it.
    """

    tokens: Sequence[int]
    max_tokens: int
    sampling: SamplingParams
    tail: Sequence[int]
    end_token_ids: frozenset[int]
    stop: tuple[str, ...]
    adapter: str | None = None


class Tokenization:
    """One tokenizer with the limits of its model.

    `vocabulary`: how many tokens the model has embeddings for. `context_tokens`: how many tokens prompt and answer
    may have together, None for no limit. `end_token_ids`: the tokens that end every answer.
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
        self._vocabulary = vocabulary
        self._context_tokens = context_tokens
        self._end_token_ids = frozenset(end_token_ids)
        #: Tokens that decoding leaves out, so that no text ever holds them: as stop strings they are end tokens.
        self._special = {str(each): number for number, each in tokenizer.added_tokens_decoder.items() if each.special}

    def prompt(self, request: Request) -> Prompt:
        """The prompt of a request whose sampling has max_tokens set. Raises Refused."""
        if request.messages is not None:
            tokens, tail = self._tokens(self._rendered(request), special=False), []
        else:
            tokens = self._tokens(request.prompt or "", special=True)
            tail = tokens[-TAIL_TOKENS:]
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
        )

    def text(self, tokens: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """What these tokens say after others, without special tokens."""
        before = self._decode(after) if after else ""
        together = self._decode([*after, *tokens])
        return together[len(before) :] if together.startswith(before) else self._decode(tokens)

    def token_text(self, token: int) -> str:
        """What one token says, special ones included."""
        text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text

    def choice(self, prompt: Prompt, tokens: Sequence[int], *, complete: bool = False) -> Choice:
        """The answer that these generated tokens are, cut before its first stop string.

        `complete`: it ended because nothing could follow.
        """
        ended = tokens[-1] in prompt.end_token_ids
        text = self.text(tokens[:-1] if ended else tokens, after=prompt.tail)
        stop = self.stop_place(prompt, tokens, text)
        if stop is not None:
            return Choice(text[:stop], "stop")
        return Choice(text, "stop" if ended or complete else "length")

    def stop_place(self, prompt: Prompt, tokens: Sequence[int], text: str) -> int | None:
        """Where in this text of these tokens the first stop string begins that is not within its min_tokens."""
        fewest = prompt.sampling.min_tokens or 0
        begin = len(self.text(tokens[:fewest], after=prompt.tail)) if fewest and prompt.stop else 0
        places = [place for place in (text.find(stop, begin) for stop in prompt.stop) if place >= 0]
        return min(places, default=None)

    def _decode(self, tokens: Sequence[int]) -> str:
        # Cleaning up would remove spaces before punctuation that the model wrote.
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        try:
            tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=special)
        except Exception as error:
            # A tokenizer has no errors of its own: a lone surrogate, say, raises whatever its language raises.
            raise Refused(ErrorCode.ENGINE_ERROR, f"the tokenizer failed: {type(error).__name__}") from error
        if not tokens:
            raise Refused(ErrorCode.ENGINE_ERROR, "the prompt is empty: it has no tokens")
        if max(tokens) >= self._vocabulary:
            raise Refused(ErrorCode.ENGINE_ERROR, "the prompt has a token that the model has no embedding for")
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

    def _rendered(self, request: Request) -> str:
        """The messages as the chat template writes them."""
        if not self._tokenizer.chat_template:
            raise Refused(
                ErrorCode.NO_CHAT_TEMPLATE, "the model has no chat template: send prompts instead of messages"
            )
        variables = {"add_generation_prompt": True, **(request.chat_template_kwargs or {})}
        if reserved := sorted(RESERVED & variables.keys()):
            raise Refused(
                ErrorCode.CHAT_TEMPLATE_ERROR, f"chat_template_kwargs may not set {', '.join(reserved)}: remove it"
            )
        try:
            return self._apply(request.messages or (), variables)
        except TemplateError as error:
            said = self._refusal(request.messages or ())
            raise Refused(ErrorCode.CHAT_TEMPLATE_ERROR, f"the chat template refused the messages: {said}") from error
        except Exception as error:
            # A template runs a request's values through operators and filters, which raise anything.
            raise Refused(ErrorCode.CHAT_TEMPLATE_ERROR, f"the chat template failed: {type(error).__name__}") from error

    def _refusal(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The template's own words, about the same roles with nothing of the prompt in them."""
        bare = [{"role": each.get("role"), "content": "-"} for each in messages]
        try:
            self._apply(bare, {"add_generation_prompt": True})
        except TemplateError as error:
            return str(error)[:REFUSAL_LENGTH]
        except Exception as error:
            return type(error).__name__
        return "it depends on what they say"

    def _apply(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        conversation = [dict(each) for each in messages]
        written: str = self._tokenizer.apply_chat_template(conversation, tokenize=False, **variables)
        return written
