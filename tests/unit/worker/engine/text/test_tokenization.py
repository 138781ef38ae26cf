"""Prompts without tokens, and with tokens that the model has no embedding for: an error of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import ErrorCode, Output, RequestKey
from batchmill.worker.engine.options import EngineChoice, EngineOptions
from batchmill.worker.engine.refused import Refused
from batchmill.worker.engine.text.tokenization import Tokenization
from batchmill.worker.engine.transformers_kind import serve
from batchmill.worker.models.load import LoadedModel, load
from tests.support.models.chains import wordpieces
from tests.support.models.tiny import build_tokenizer, save_tiny_model

SAMPLING = SamplingParams(max_tokens=2, temperature=0.0)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model whose tokenizer was given tokens, and its weights no rows for them."""
    folder: Path = save_tiny_model(tmp_path_factory.mktemp("tiny"), generation={})
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<|first|>", "<|second|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return load(ModelSpec(str(folder), quantization=Quantization(Kind.NONE)), "cpu")


def answers(loaded: LoadedModel, kind: EngineChoice, *requests: GenerationRequest) -> list[Output]:
    options = EngineOptions(kind=kind, max_rows=4)
    engine = serve(loaded, options=options)
    for request in requests:
        engine.add(RequestKey("job", request.index), request)
    outputs: list[Output] = []
    while engine.waiting or engine.active:
        outputs += engine.step()
    return sorted(outputs, key=lambda output: output.key.index)


def test_a_prompt_without_tokens_is_refused() -> None:
    tokenizer = wordpieces()
    tokenization = Tokenization(tokenizer, vocabulary=len(tokenizer), context_tokens=None, end_token_ids=[1])
    assert tokenization.prompt(GenerationRequest(0, "0", prompt="now", sampling=SAMPLING)).tokens
    with pytest.raises(Refused, match="the prompt has no tokens") as caught:
        tokenization.prompt(GenerationRequest(0, "0", prompt="", sampling=SAMPLING))
    assert caught.value.code == ErrorCode.EMPTY_PROMPT


@pytest.mark.parametrize("kind", [EngineChoice.CONTINUOUS, EngineChoice.GENERATE])
def test_a_token_without_an_embedding_is_an_error_of_its_own(loaded: LoadedModel, kind: EngineChoice) -> None:
    chat = ({"role": "user", "content": "x <|first|>"},)
    fine, plain, message = answers(
        loaded,
        kind,
        GenerationRequest(0, "0", prompt="abc", sampling=SAMPLING),
        GenerationRequest(1, "1", prompt="x <|first|><|second|>", sampling=SAMPLING),
        GenerationRequest(2, "2", messages=chat, sampling=SAMPLING),
    )
    assert fine.error is None
    assert len(fine.payload) == 1
    for output, token, prompt_tokens in ((plain, 261, 5), (message, 260, 21)):
        assert output.error is not None
        assert output.error.code == "unknown_token"
        assert f"makes token {token} of the prompt, and the model has 260, counted from 0" in output.error.message
        assert output.prompt_tokens == prompt_tokens


@pytest.mark.parametrize("kind", [EngineChoice.CONTINUOUS, EngineChoice.GENERATE])
def test_an_end_and_a_stop_string_that_the_model_cannot_write_never_come(
    loaded: LoadedModel, kind: EngineChoice
) -> None:
    sampling = SamplingParams(max_tokens=3, temperature=0.0, stop=("<|first|>",), min_tokens=1)
    [output] = answers(loaded, kind, GenerationRequest(0, "0", prompt="abc", sampling=sampling))
    assert output.error is None
    assert output.completion_tokens == 3
