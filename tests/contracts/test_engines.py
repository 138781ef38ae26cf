"""The contract of engines, checked on each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.worker.engine import Engine, Progress
from batchmill.worker.engine.continuous.engine import ContinuousEngine
from batchmill.worker.engine.echo.engine import EchoEngine
from batchmill.worker.engine.generate.engine import GenerateEngine
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.models.load import LoadedModel, load
from tests.support.models.tiny import save_tiny_model
from tests.support.paths import ROOT

Make = Callable[..., Engine]
#: Six words, and more tokens of a byte each.
PROMPT = "one two three four five six"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"), generation={})
    return load(ModelSpec(str(folder), quantization=Quantization(Kind.NONE)), "cpu")


@pytest.fixture(params=["echo", "generate", "continuous"])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes an engine of a kind with these rows and this progress."""
    if request.param == "echo":
        return EchoEngine
    loaded: LoadedModel = request.getfixturevalue("loaded")

    def make_continuous(*, rows: int = 8, progress: Progress = lambda: False) -> Engine:
        engine = ContinuousEngine(loaded, options=EngineOptions(max_rows=rows), progress=progress)
        request.addfinalizer(engine.close)
        return engine

    def make_generate(*, rows: int = 8, progress: Progress = lambda: False) -> Engine:
        return GenerateEngine(loaded, options=EngineOptions(max_rows=rows), progress=progress)

    return make_continuous if request.param == "continuous" else make_generate


def key(index: int) -> RequestKey:
    return RequestKey("job", index)


def request(index: int, *, prompt: str = PROMPT, **sampling: object) -> GenerationRequest:
    asked = SamplingParams(**{"max_tokens": 4, "temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return GenerationRequest(index, f"id-{index}", prompt=prompt, sampling=asked)


def drain(engine: Engine) -> list[Output]:
    """Steps until the engine is empty."""
    outputs: list[Output] = []
    while engine.waiting or engine.active:
        outputs += engine.step()
    return outputs


def indices(outputs: list[Output]) -> list[int]:
    return sorted(output.key.index for output in outputs)


def test_every_request_comes_back_exactly_once(make: Make) -> None:
    engine = make(rows=4)
    for index in range(11):
        engine.add(key(index), request(index, prompt=PROMPT * (1 + index % 3), max_tokens=1 + index))
    outputs = drain(engine)
    assert indices(outputs) == list(range(11))
    assert all(output.error is None and len(output.payload) == 1 for output in outputs)
    assert (engine.waiting, engine.active, engine.step()) == (0, 0, [])


def test_the_order_of_admission_loses_no_request(make: Make) -> None:
    requests = [request(index, prompt=PROMPT[index:]) for index in range(4)]
    assert sorted(make().admission_order(requests), key=lambda each: each.index) == requests


def chat(index: int, text: str, tool: str, *, adapter: str | None = None) -> GenerationRequest:
    message = {"role": "user", "content": text}
    return GenerationRequest(index, str(index), messages=(message,), tools=({"name": tool},), adapter=adapter)


def test_the_continuous_engine_admits_requests_with_a_common_beginning_beside_each_other() -> None:
    prompts = ["b, one", "a, one", "b, two", "a, two"]
    requests = [request(index, prompt=each) for index, each in enumerate(prompts)]
    assert [each.index for each in ContinuousEngine.admission_order(requests)] == [1, 3, 0, 2]
    # Tools stand before all messages, and rows of two adapters have no beginning in common.
    chats = [
        chat(0, "a", "later"),
        chat(1, "b", "clock"),
        chat(2, "a", "later", adapter="x"),
        chat(3, "c", "clock"),
    ]
    assert [each.index for each in ContinuousEngine.admission_order(chats)] == [1, 3, 0, 2]


def test_an_engine_closes_also_where_it_did_nothing(make: Make) -> None:
    make().close()


def test_a_step_without_requests_gives_nothing(make: Make) -> None:
    assert make().step() == []


def test_requests_may_be_added_while_others_are_worked_on(make: Make) -> None:
    added: list[int] = []

    def progress() -> bool:
        if len(added) < 3:
            added.append(len(added) + 1)
            engine.add(key(added[-1]), request(added[-1]))
        return False

    engine = make(rows=2, progress=progress)
    engine.add(key(0), request(0))
    assert indices(drain(engine)) == [0, *added]


def test_cancelled_requests_give_no_output(make: Make) -> None:
    engine = make(rows=4)
    for index in range(6):
        engine.add(key(index), request(index))
    engine.cancel([key(1), key(4), key(99)])
    assert engine.waiting == 4
    outputs = drain(engine)
    engine.cancel([key(0)])
    assert indices(outputs) == [0, 2, 3, 5]


def test_a_request_may_be_cancelled_in_the_middle_of_a_step(make: Make) -> None:
    def progress() -> bool:
        engine.cancel([key(1)])
        return False

    engine = make(progress=progress)
    for index in range(3):
        engine.add(key(index), request(index))
    assert indices(drain(engine)) == [0, 2]


def test_progress_is_called_in_every_step(make: Make) -> None:
    calls: list[int] = []
    engine = make(rows=1, progress=lambda: calls.append(1) is not None)
    for index in range(3):
        engine.add(key(index), request(index))
    drain(engine)
    assert len(calls) >= 3


def test_progress_ends_a_step_early_and_what_is_unfinished_waits_again(make: Make) -> None:
    stopped = [True]
    engine = make(rows=8, progress=lambda: stopped[0])
    for index in range(5):
        engine.add(key(index), request(index))
    assert engine.step() == []
    assert engine.waiting + engine.active == 5
    stopped[0] = False
    assert indices(drain(engine)) == list(range(5))


def test_requests_with_any_sampling_run_together(make: Make) -> None:
    engine = make(rows=8)
    mixed: list[dict[str, object]] = [
        {},
        {"temperature": 1.3},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 10, "min_p": 0.01},
        {"repetition_penalty": 1.2, "stop": ("two words",)},
    ]
    for index, sampling in enumerate(mixed):
        engine.add(key(index), request(index, **sampling))
    outputs = engine.step()
    assert engine.waiting == 0
    assert indices(outputs + drain(engine)) == list(range(len(mixed)))


def test_the_same_seed_gives_the_same_answer_alone_and_in_company(make: Make) -> None:
    engine = make(rows=8)
    for index, seed in enumerate([5, None, 5, 6]):
        engine.add(key(index), request(index, temperature=1.0, seed=seed, max_tokens=20))
    together = {output.key.index: output.payload for output in drain(engine)}
    engine.add(key(9), request(9, temperature=1.0, seed=5, max_tokens=20))
    alone = drain(engine)[0].payload
    assert alone == together[0] == together[2]


def test_an_answer_is_cut_at_its_own_max_tokens(make: Make) -> None:
    engine = make()
    for index, most in enumerate([1, 3, 2]):
        engine.add(key(index), request(index, max_tokens=most))
    for output in drain(engine):
        assert output.completion_tokens == [1, 3, 2][output.key.index]
        assert output.payload[0].finish_reason == "length"
        assert output.prompt_tokens >= len(PROMPT.split())


def test_an_answer_is_cut_before_its_stop_string(make: Make) -> None:
    engine = make()
    engine.add(key(0), request(0, max_tokens=6))
    whole = drain(engine)[0].payload[0].text
    stop = whole[2:4]
    engine.add(key(1), request(1, max_tokens=6, stop=("not there", stop)))
    choice = drain(engine)[0].payload[0]
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_messages_are_answered(make: Make) -> None:
    messages = ({"role": "system", "content": "be kind"}, {"role": "user", "content": "say something"})
    engine = make()
    engine.add(
        key(0), GenerationRequest(0, "id", messages=messages, sampling=SamplingParams(max_tokens=9, temperature=0.0))
    )
    output = drain(engine)[0]
    assert output.error is None
    assert output.prompt_tokens >= 4


def test_echo_answers_with_the_prompt_word_for_word() -> None:
    engine = EchoEngine()
    engine.add(key(0), request(0, prompt="  one\n two  three ", max_tokens=3))
    engine.add(key(1), request(1, prompt="  one\n two  three ", max_tokens=2))
    engine.add(key(2), request(2, prompt=""))
    said = [(each.payload[0].text, each.payload[0].finish_reason, each.completion_tokens) for each in engine.step()]
    assert said == [("  one\n two  three ", "stop", 3), ("  one\n two", "length", 2), ("", "stop", 0)]


def test_echo_answers_with_the_last_message_of_the_user() -> None:
    said = [("user", "first"), ("assistant", "hm"), ("user", "the last one"), ("assistant", "and")]
    engine = EchoEngine()
    messages = tuple({"role": role, "content": content} for role, content in said)
    engine.add(
        key(0), GenerationRequest(0, "id", messages=messages, sampling=SamplingParams(max_tokens=9, temperature=0.0))
    )
    output = engine.step()[0]
    assert (output.payload[0].text, output.prompt_tokens, output.completion_tokens) == ("the last one", 6, 3)


def test_a_slow_echo_reports_while_it_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        now[0] += seconds
        slept.append(seconds)

    monkeypatch.setattr("batchmill.worker.engine.echo.engine.time.monotonic", lambda: now[0])
    monkeypatch.setattr("batchmill.worker.engine.echo.engine.time.sleep", sleep)
    engine = EchoEngine(seconds_per_step=0.12)
    engine.add(key(0), request(0))
    assert indices(engine.step()) == [0]
    assert slept == pytest.approx([0.05, 0.05, 0.02])
    engine = EchoEngine(seconds_per_step=9.0, progress=lambda: len(slept) > 5)
    engine.add(key(0), request(0))
    assert (engine.step(), engine.waiting) == ([], 1)


def test_echo_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    modules = "batchmill.worker.engine.echo.engine, batchmill.worker.engine.generate.batching"
    script = f"import sys, {modules}; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert said.stdout.strip() == "False"
