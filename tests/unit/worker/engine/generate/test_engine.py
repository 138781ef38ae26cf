"""The engine around `generate`: exact answers, ends of rows, refused requests, and too little memory."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.worker.engine.generate.engine import GenerateEngine
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.models.load import LoadedModel, load
from tests.support.models.tiny import CONTEXT_TOKENS, build_tokenizer, save_tiny_model

END, OTHER_END = 1, 3
GREEDY = SamplingParams(max_tokens=20, temperature=0.0)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    return load(ModelSpec(str(folder), quantization=Quantization(Kind.NONE)), "cpu")


class Alphabet:
    """The loaded model with another forward: after each byte comes the next one, and after `~` an end token.

    It remembers the rows and the largest position of each forward, and fails above `most_rows`.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.after = torch.arange(1, loaded.vocabulary + 1).remainder(loaded.vocabulary)
        tilde, bang = loaded.tokenizer.convert_tokens_to_ids(["~", "!"])
        self.after[tilde] = END
        self.bang = bang
        self.rows: list[int] = []
        self.largest_position = 0
        self.most_rows = 10**9
        self.error: Exception = torch.OutOfMemoryError("CUDA out of memory")

    def forward(self, input_ids: torch.Tensor, **given: Any) -> CausalLMOutputWithPast:
        self.rows.append(len(input_ids))
        self.largest_position = max(self.largest_position, int(given["position_ids"].max()))
        if len(input_ids) > self.most_rows:
            raise self.error
        logits = torch.zeros(*input_ids.shape, len(self.after))
        logits.scatter_(2, self.after[input_ids][..., None], 9.0)
        return CausalLMOutputWithPast(logits=logits, past_key_values=given.get("past_key_values"))


@pytest.fixture
def alphabet(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Alphabet:
    fake = Alphabet(loaded)
    forward = functools.wraps(loaded.model.forward)(lambda *args, **given: fake.forward(*args, **given))
    monkeypatch.setattr(loaded.model, "forward", forward)
    return fake


def key(index: int) -> RequestKey:
    return RequestKey("job", index)


def answers(engine: GenerateEngine, *requests: GenerationRequest) -> list[Output]:
    """The outputs of these requests, in their order."""
    for request in requests:
        engine.add(key(request.index), request)
    outputs = []
    while engine.waiting:
        outputs += engine.step()
    return sorted(outputs, key=lambda output: output.key.index)


def prompt(index: int, text: str, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(index, str(index), prompt=text, sampling=replace(GREEDY, **sampling))


def chat(*contents: str, role: str = "user", **values: Any) -> GenerationRequest:
    messages = tuple({"role": role, "content": content} for content in contents)
    return GenerationRequest(0, "0", messages=messages, sampling=GREEDY, **values)


def error(output: Output) -> tuple[str, str]:
    assert output.error is not None
    return output.error.code, output.error.message


def test_greedy_answers_are_those_of_transformers_one_by_one(loaded: LoadedModel) -> None:
    model = LlamaForCausalLM.from_pretrained(loaded.spec.model)
    texts = ["a", "some longer prompt of more words", "xyz", "medium length", "some other prompt, of its own length"]
    outputs = answers(
        GenerateEngine(loaded, options=EngineOptions(max_rows=8)),
        *(prompt(place, text) for place, text in enumerate(texts)),
    )
    for text, output in zip(texts, outputs, strict=True):
        tokens = loaded.tokenizer(text, return_tensors="pt")
        whole = model.generate(**tokens, max_new_tokens=20, do_sample=False, eos_token_id=[END, OTHER_END])[0]
        generated = whole[tokens.input_ids.shape[1] :]
        assert output.payload[0].text == loaded.tokenizer.decode(generated, skip_special_tokens=True)
        assert (output.prompt_tokens, output.completion_tokens) == (tokens.input_ids.shape[1], len(generated))


def test_an_end_token_ends_the_answer_and_counts(loaded: LoadedModel, alphabet: Alphabet) -> None:
    [output] = answers(GenerateEngine(loaded), prompt(0, "z"))
    assert output.payload[0].text == "{|}~"
    assert (output.payload[0].finish_reason, output.completion_tokens, output.prompt_tokens) == ("stop", 5, 2)


@pytest.mark.parametrize("token", [END, OTHER_END])
def test_every_end_token_of_checkpoint_and_tokenizer_ends_an_answer(
    loaded: LoadedModel, alphabet: Alphabet, token: int
) -> None:
    alphabet.after[alphabet.after == END] = token
    [output] = answers(GenerateEngine(loaded), prompt(0, "}"))
    assert (output.payload[0].text, output.payload[0].finish_reason) == ("~", "stop")


def test_an_end_token_in_the_last_place_is_a_stop(loaded: LoadedModel, alphabet: Alphabet) -> None:
    outputs = answers(GenerateEngine(loaded), prompt(0, "}", max_tokens=2), prompt(1, "}", max_tokens=1))
    assert [output.payload[0].finish_reason for output in outputs] == ["stop", "length"]


def test_stop_strings_are_found_across_tokens_each_row_for_itself(loaded: LoadedModel, alphabet: Alphabet) -> None:
    outputs = answers(
        GenerateEngine(loaded, options=EngineOptions(max_rows=8)),
        prompt(0, "a", stop=("efg",)),
        prompt(1, "a", stop=("xyz", "ij", "hijk")),
        prompt(2, "a"),
        prompt(3, "c", stop=("ab", "abc", "bcd")),
        prompt(4, "a", stop=("b",)),
    )
    said = [(each.payload[0].text, each.payload[0].finish_reason, each.completion_tokens) for each in outputs]
    assert said[:2] == [("bcd", "stop", 6), ("bcdefgh", "stop", 9)]
    assert said[2:] == [("bcdefghijklmnopqrstu", "length", 20), ("defghijklmnopqrstuvw", "length", 20), ("", "stop", 1)]


def test_a_special_token_may_be_a_stop_string(loaded: LoadedModel, alphabet: Alphabet) -> None:
    own_end = replace(loaded, end_token_ids=(END,))
    alphabet.after[alphabet.bang] = OTHER_END
    alphabet.after[OTHER_END] = alphabet.bang
    outputs = answers(
        GenerateEngine(own_end), prompt(0, "!", stop=("<|end|>",)), prompt(1, "!", max_tokens=4, stop=("never",))
    )
    said = [(each.payload[0].text, each.payload[0].finish_reason, each.completion_tokens) for each in outputs]
    assert said == [("", "stop", 1), ("!!", "length", 4)]


def test_no_row_waits_for_a_row_that_has_ended(loaded: LoadedModel, alphabet: Alphabet) -> None:
    answers(GenerateEngine(loaded), prompt(0, "}"), prompt(1, "a", stop=("d",)), prompt(2, "w", max_tokens=5))
    assert alphabet.rows == [3] * 5


def test_progress_keeps_what_has_ended_and_lets_the_rest_wait_in_order(loaded: LoadedModel, alphabet: Alphabet) -> None:
    steps: list[int] = []
    engine = GenerateEngine(loaded, progress=lambda: steps.append(1) is None and len(steps) == 4)
    for index, text in enumerate(["a", "|", "b", "}"]):
        engine.add(key(index), prompt(index, text))
    first = engine.step()
    assert [(output.key.index, output.payload[0].text) for output in first] == [(1, "}~"), (3, "~")]
    assert engine.waiting == 2
    assert [output.key.index for output in engine.step()] == [0, 2]
    assert len(steps) == 4 + 1 + 20, "once before each micro-batch, and once per token step"


def test_a_prompt_beyond_the_context_is_an_error_of_its_own(loaded: LoadedModel, alphabet: Alphabet) -> None:
    text = "secret" * CONTEXT_TOKENS
    long, fitting = answers(GenerateEngine(loaded), prompt(0, text), prompt(1, "a", max_tokens=1))
    assert error(long)[0] == "context_length_exceeded"
    assert long.prompt_tokens == len(text) + 1
    assert "secret" not in error(long)[1]
    assert fitting.payload[0].text == "b"


def test_max_tokens_is_shortened_to_the_context(loaded: LoadedModel, alphabet: Alphabet) -> None:
    alphabet.after[:] = alphabet.bang
    texts = ["x" * (CONTEXT_TOKENS - 2), "x" * (CONTEXT_TOKENS - 11), "x" * (CONTEXT_TOKENS - 1)]
    outputs = answers(
        GenerateEngine(loaded), *(prompt(place, text, max_tokens=10**9) for place, text in enumerate(texts))
    )
    assert [output.payload[0].text for output in outputs[:2]] == ["!", "!" * 10]
    assert outputs[0].payload[0].finish_reason == "length"
    assert error(outputs[2])[0] == "context_length_exceeded"
    assert alphabet.rows == [2] * 10, "they ran together"
    assert alphabet.largest_position < CONTEXT_TOKENS


def test_messages_go_through_the_chat_template_with_no_further_special_tokens(
    loaded: LoadedModel, alphabet: Alphabet
) -> None:
    given = chat("hello", chat_template_kwargs={"suffix": "!"})
    [output] = answers(GenerateEngine(loaded), given)
    assert output.prompt_tokens == len("s" + "[user]hello!" + "[assistant]")
    [output] = answers(GenerateEngine(loaded), chat("hello", chat_template_kwargs={"add_generation_prompt": False}))
    assert output.prompt_tokens == len("s" + "[user]hello")


def test_without_a_chat_template_messages_are_an_error(loaded: LoadedModel, alphabet: Alphabet) -> None:
    bare = replace(loaded, tokenizer=build_tokenizer(chat_template=None))
    [output] = answers(GenerateEngine(bare), chat("hello"))
    assert error(output)[0] == "no_chat_template"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (chat("x", role="tool"), "the chat template refused the messages: no role 'tool' here"),
        (chat("refuse me"), "the chat template refused the messages: it depends on what they say"),
        (chat("x", chat_template_kwargs={"suffix": 3}), "the chat template failed: TypeError"),
        (chat("x", chat_template_kwargs={"tokenize": 1, "chat_template": "{{ 1 }}"}),
         "chat_template_kwargs may not set chat_template, tokenize: remove it"),
    ],
)  # fmt: skip
def test_what_a_chat_template_refuses_is_the_error_of_one_request(
    loaded: LoadedModel, given: GenerationRequest, message: str
) -> None:
    [output] = answers(GenerateEngine(loaded), given)
    assert error(output) == ("chat_template_error", message)


TEMPLATES = {"rag": "[rag]{{ messages[0].content }}", "tool_use": "[tools]{{ messages[0].content }}{{ tools }}"}


@pytest.fixture
def several(loaded: LoadedModel) -> LoadedModel:
    """A model with templates by name, of which none is the default."""
    return replace(loaded, tokenizer=build_tokenizer(chat_template=TEMPLATES))  # type: ignore[arg-type]


def test_of_several_chat_templates_a_request_has_to_name_one(several: LoadedModel) -> None:
    for chosen in ({}, {"chat_template": "other"}, {"chat_template": "{{ messages }}"}):
        [output] = answers(GenerateEngine(several), chat("ab", chat_template_kwargs=chosen))
        code, message = error(output)
        assert code == "chat_template_error"
        assert "the chat templates rag, tool_use, and the request does not say which" in message
        assert '--chat-template-kwargs \'{"chat_template": "rag"}\'' in message


def test_a_named_chat_template_is_taken(several: LoadedModel) -> None:
    asked = chat("ab", chat_template_kwargs={"chat_template": "rag"})
    [output] = answers(GenerateEngine(several), asked)
    assert (output.error, output.prompt_tokens) == (None, len("[rag]ab"))


def test_the_default_of_several_chat_templates_needs_no_name(loaded: LoadedModel) -> None:
    templates = TEMPLATES | {"default": "{{ messages[0].content }}"}
    model = replace(loaded, tokenizer=build_tokenizer(chat_template=templates))  # type: ignore[arg-type]
    [output] = answers(GenerateEngine(model), chat("ab"))
    assert (output.error, output.prompt_tokens) == (None, 2)


def test_a_prompt_that_no_tokenizer_takes_is_an_error_of_its_own(loaded: LoadedModel, alphabet: Alphabet) -> None:
    broken, fine = answers(GenerateEngine(loaded), prompt(0, "\ud800"), prompt(1, "a", max_tokens=1))
    assert error(broken)[0] == "engine_error"
    assert fine.payload[0].text == "b"


@pytest.mark.parametrize(
    ("most_rows", "failure"),
    [
        (1, torch.OutOfMemoryError("CUDA out of memory")),
        (3, RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        (7, RuntimeError("not enough memory")),
    ],
)
def test_out_of_memory_halves_the_micro_batch_until_it_fits_and_remembers(
    loaded: LoadedModel, alphabet: Alphabet, most_rows: int, failure: Exception
) -> None:
    alphabet.most_rows, alphabet.error = most_rows, failure
    engine = GenerateEngine(loaded, options=EngineOptions(max_rows=16))
    outputs = answers(engine, *(prompt(index, "a", max_tokens=2) for index in range(16)))
    assert [output.payload[0].text for output in outputs] == ["bc"] * 16
    failed = [rows for rows in alphabet.rows if rows > most_rows]
    assert failed == [rows for rows in (16, 8, 4, 2) if rows > most_rows]
    alphabet.rows.clear()
    answers(engine, *(prompt(index, "a", max_tokens=2) for index in range(16)))
    assert max(alphabet.rows) <= most_rows


def test_a_request_that_fails_alone_is_an_error_of_its_own(loaded: LoadedModel, alphabet: Alphabet) -> None:
    alphabet.most_rows = 0
    engine = GenerateEngine(loaded)
    outputs = answers(engine, prompt(0, "a"), prompt(1, "secret"))
    assert [error(output)[0] for output in outputs] == ["out_of_memory"] * 2
    assert not any("secret" in error(output)[1] for output in outputs)
    alphabet.most_rows = 1
    assert answers(engine, prompt(0, "a", max_tokens=1))[0].payload[0].text == "b"


def test_other_failures_of_the_device_are_raised(loaded: LoadedModel, alphabet: Alphabet) -> None:
    alphabet.most_rows, alphabet.error = 0, RuntimeError("CUDA error: device-side assert triggered")
    engine = GenerateEngine(loaded)
    engine.add(key(0), prompt(0, "a"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        engine.step()


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer that writes a word's leading space only where something stands before it."""
    words = {"<unk>": 0, "</s>": END, "<pad>": 2, "<end>": OTHER_END, "▁one": 4, "▁two": 5, "▁three": 6}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def test_the_answer_to_a_prompt_continues_its_text(loaded: LoadedModel, alphabet: Alphabet) -> None:
    words = replace(loaded, tokenizer=sentencepiece_like())
    [output] = answers(GenerateEngine(words), prompt(0, "one", max_tokens=4, stop=(" three",)))
    assert (output.payload[0].text, output.completion_tokens) == (" two", 2)
