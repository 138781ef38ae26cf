"""Text and tokens of answers: characters that are whole stay whole, and every token says what it adds to the text."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from batchmill.jobs.requests.generation import Choice, GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.producer.requests.generation import _completion_logprobs
from batchmill.worker.engine.continuous.engine import ContinuousEngine
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.engine.text.decoding import Decoding
from batchmill.worker.models.load import LoadedModel
from tests.support.models.chains import load_chain, sentencepiece, wordpieces
from tests.support.models.tiny import build_tokenizer

#: The bytes of a character of four, and the first two of another.
FACE = ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
SAYING = {
    "▁Hello": ["▁world"], "▁world": [FACE[0]], FACE[0]: [FACE[1]], FACE[1]: [FACE[2]], FACE[2]: [FACE[3]],
    FACE[3]: [FACE[0]], "a": ["▁true", "true", "▁world", "world"], "▁true": ["true"], "A": ["A", "<0x41>"],
    "]": ["▁true"],
}  # fmt: skip


@pytest.fixture(scope="module")
def saying() -> LoadedModel:
    return load_chain(sentencepiece("▁Hello", "▁world", "world", "▁true", "true"), nexts=SAYING)


def answer(model: LoadedModel, prompt: str | None, *, chat: bool = False, **sampling: Any) -> Output:
    messages = ({"role": "user", "content": prompt},) if chat else None
    asked = SamplingParams(**{"max_tokens": 20, "temperature": 0.0} | sampling)
    with closing(ContinuousEngine(model, options=EngineOptions(max_rows=2))) as engine:
        engine.add(RequestKey("job", 0), GenerationRequest(0, "0", None if chat else prompt, messages, asked))
        outputs: list[Output] = []
        while engine.waiting or engine.active:
            outputs += engine.step()
    [output] = outputs
    assert output.error is None
    return output


def content_of(choice: Choice) -> list[dict[str, Any]]:
    assert choice.logprobs is not None
    content: list[dict[str, Any]] = choice.logprobs["content"]
    assert "".join(each["token"] for each in content) == choice.text
    for each in content:
        names = [top["token"] for top in each["top_logprobs"]]
        assert len(set(names)) == len(names)
        assert all(top["bytes"] is not None for top in [each, *each["top_logprobs"]])
    return content


@pytest.mark.parametrize(
    ("most", "said"), [(9, " world😀😀"), (11, " world😀😀\ufffd"), (12, " world😀😀\ufffd"), (2, " world\ufffd")]
)
def test_characters_beside_one_that_is_cut_stay_whole(saying: LoadedModel, most: int, said: str) -> None:
    assert answer(saying, "Hello", max_tokens=most).payload[0].text == said


def test_a_cut_character_hides_no_stop_string(saying: LoadedModel) -> None:
    stopped = answer(saying, "Hello", stop=("😀\ufffd", "😀😀"), logprobs=True)
    assert (stopped.payload[0].text, stopped.completion_tokens) == (" world", 6)
    assert [each["token"] for each in content_of(stopped.payload[0])] == [" world", "", "", "", "", ""]


def test_every_token_says_what_it_adds_to_the_text_and_its_bytes(saying: LoadedModel) -> None:
    content = content_of(answer(saying, "Hello", max_tokens=3, logprobs=True, top_logprobs=2).payload[0])
    assert [each["token"] for each in content] == [" world", "", "\ufffd"]
    assert [each["bytes"] for each in content] == [list(b" world"), [240], [159]]
    content = content_of(answer(saying, "a", logprobs=True, top_logprobs=4).payload[0])
    assert [each["token"] for each in content] == [" true", "true", ""]
    assert [top["token"] for top in content[0]["top_logprobs"]] == [" true", "true", " world", "world"]
    assert content[0]["top_logprobs"][2]["bytes"] == list(b" world")


def test_two_tokens_of_the_same_text_have_two_names(saying: LoadedModel) -> None:
    content = content_of(answer(saying, "A", max_tokens=1, logprobs=True, top_logprobs=2).payload[0])
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["A", "<0x41>"]
    form = _completion_logprobs(content_of(answer(saying, "a", logprobs=True, top_logprobs=4).payload[0]))
    assert [len(each) for each in form["top_logprobs"]] == [4, 4, 4]
    assert form["text_offset"] == [0, 5, 9]


def test_a_chats_answer_begins_without_the_space_of_its_first_word(saying: LoadedModel) -> None:
    [choice] = answer(saying, "a", chat=True, logprobs=True, top_logprobs=1).payload
    assert [(each["token"], bytes(each["bytes"])) for each in content_of(choice)][:2] == [("true", b"true")] * 2


def test_a_character_of_byte_letters_is_whole_in_its_last_token() -> None:
    tokenizer = build_tokenizer()
    letters = tokenizer.convert_ids_to_tokens(tokenizer.encode("é!", add_special_tokens=False))
    model = load_chain(tokenizer, nexts=dict(zip(["a", *letters], [[each] for each in letters], strict=False)))
    content = content_of(answer(model, "a", logprobs=True, top_logprobs=3).payload[0])
    assert [each["token"] for each in content] == ["", "é", "!", ""]
    assert [each["bytes"] for each in content] == [[0xC3], [0xA9], [33], []]


def test_a_tokenizer_without_bytes_has_its_spaces_too() -> None:
    model = load_chain(wordpieces(), nexts={"now": ["play"], "play": ["##ing"], "##ing": ["play"]})
    content = content_of(answer(model, "now", max_tokens=3, logprobs=True, top_logprobs=2).payload[0])
    assert [each["token"] for each in content] == [" play", "ing", " play"]


def test_a_tokenizer_without_bytes_writes_an_end_that_begins_a_text_as_it_is_decoded() -> None:
    tokenizer = wordpieces()
    tokens = tokenizer.convert_tokens_to_ids(["##ing", "play", "##ed"])
    assert Decoding(tokenizer).parts(tokens, after=[]) == [("##ing", b"##ing"), (" play", b" play"), ("ed", b"ed")]


def test_a_text_begins_without_the_space_of_its_first_word_beside_characters_of_several_tokens() -> None:
    tokenizer = sentencepiece("▁true")
    tokens = tokenizer.convert_tokens_to_ids(["▁true", *FACE])
    parts = Decoding(tokenizer).parts(tokens, after=[])
    assert [part for part, _ in parts] == ["true", "", "", "", "😀"]
    assert b"".join(known for _, known in parts) == "true😀".encode()


def test_a_token_beyond_the_tokenizer_says_nothing_and_has_a_name() -> None:
    model = load_chain(build_tokenizer(), nexts={"a": [300], 300: ["b"]}, vocabulary=320)
    [choice] = answer(model, "a", logprobs=True, top_logprobs=3).payload
    assert (choice.text, [each["token"] for each in content_of(choice)]) == ("b", ["", "b", ""])
    [choice] = answer(model, "b", logprobs=True, top_logprobs=20, logit_bias=((300, 5.0),)).payload
    assert content_of(choice)


@pytest.mark.parametrize("tokenizer", [sentencepiece("▁Hello"), build_tokenizer()], ids=["pieces", "bytes"])
def test_a_prompt_has_one_begin_token(tokenizer: PreTrainedTokenizerBase) -> None:
    model = load_chain(tokenizer, nexts={})
    [bare, begun, twice] = [answer(model, text, max_tokens=1) for text in ("Hello", "<s>Hello", "<s><s>Hello")]
    assert bare.prompt_tokens == begun.prompt_tokens == twice.prompt_tokens - 1
    assert answer(model, "x", chat=True, max_tokens=1).prompt_tokens == len(
        model.tokenizer.encode("[user]x[assistant]")
    )
