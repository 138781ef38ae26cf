"""The values that travel: ModelSpec's one spelling, sampling levels, round trips, legal transitions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import UsageError
from jobs.schema import (
    BATCH_BEFORE,
    JOB_BEFORE,
    NO_SAMPLING,
    BatchState,
    Choice,
    ErrorCode,
    JobOptions,
    JobState,
    ModelSpec,
    Output,
    Quantization,
    Request,
    RequestKey,
    RequestState,
    SamplingParams,
    new_job_id,
)

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
specs = st.builds(ModelSpec, texts, st.none() | texts, st.sampled_from(Quantization))


@given(specs)
def test_a_spec_survives_its_canonical_spelling(spec: ModelSpec) -> None:
    assert ModelSpec.from_canonical(spec.canonical) == spec


@given(specs, specs)
def test_equal_specs_share_a_queue_and_different_ones_do_not(one: ModelSpec, other: ModelSpec) -> None:
    assert (one == other) == (one.queue == other.queue)


@given(specs)
def test_queue_names_are_safe_in_redis(spec: ModelSpec) -> None:
    assert re.fullmatch(r"bm-[a-z0-9-]{1,24}-[0-9a-f]{12}", spec.queue)


def test_a_folder_is_known_by_its_real_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    spec = ModelSpec.parse(str(tmp_path / "link"))
    assert spec == ModelSpec.parse(f"{folder}/../model/")
    assert spec == ModelSpec.parse("model")
    assert spec.folder == folder
    assert spec.quantization is Quantization.NF4


@pytest.mark.parametrize("name", ["./none", "/no/such/folder", "~/none", "a/b/c", "", "a\nb", "-x", "org/"])
def test_a_folder_that_is_not_here_and_names_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        ModelSpec.parse(name)


def test_a_remote_folder_is_taken_on_request() -> None:
    assert ModelSpec.parse("/no/such/folder", remote_path=True).model == "/no/such/folder"
    with pytest.raises(UsageError, match="absolute"):
        ModelSpec.parse("folder", remote_path=True)


def test_hub_ids_keep_their_revision_and_literal_names_have_none() -> None:
    spec = ModelSpec.parse("org/name", quantization="int8", revision="v1")
    assert (spec.revision, spec.quantization) == ("v1", Quantization.INT8)
    assert spec.command_line() == ["batchmill", "worker", "-m", "org/name", "-q", "int8", "--revision", "v1"]
    with pytest.raises(UsageError, match="--revision"):
        ModelSpec.parse("demo", revision="v1")
    with pytest.raises(UsageError, match="nf4, fp4, int8, none"):
        ModelSpec.parse("demo", quantization="nf5")
    assert ModelSpec.parse("echo").quantization is Quantization.NONE
    with pytest.raises(UsageError, match="echo"):
        ModelSpec.parse("echo", quantization="nf4")


def test_the_request_wins_over_the_job_over_the_model_over_the_fallback() -> None:
    line, flags = SamplingParams(temperature=0.0), SamplingParams(temperature=0.5, top_p=0.9, stop=("a",))
    model = SamplingParams(top_p=0.1, top_k=5)
    held = line.over(flags).over(model).over(SamplingParams.fallback())
    assert held == SamplingParams(max_tokens=256, temperature=0.0, top_p=0.9, top_k=5, stop=("a",))


def test_the_jobs_system_message_goes_where_there_is_none() -> None:
    options = JobOptions("be brief", SamplingParams(seed=1))
    own = Request(0, "a", messages=({"role": "system", "content": "x"}, {"role": "user", "content": "y"}))
    plain = Request(1, "b", prompt="y")
    assert own.under(options).messages == own.messages
    assert plain.under(options).messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "y"},
    )
    assert plain.under(options).prompt is None
    assert plain.under(JobOptions()) == plain


def test_requests_and_options_survive_their_json() -> None:
    full = Request(
        3,
        "c",
        messages=({"role": "user", "content": "\u2028 ü"},),
        sampling=SamplingParams(max_tokens=5, stop=("a", "b"), seed=-1),
        chat_template_kwargs={"enable_thinking": False},
        passthrough={"metadata": {"k": "v"}},
    )
    bare = Request(4, "d", prompt="")
    for request in (full, bare):
        assert Request.from_body(request.index, request.custom_id, request.to_body()) == request
    assert Request.from_body(4, "d", bare.to_body()).sampling is NO_SAMPLING
    options = JobOptions("s", full.sampling)
    assert JobOptions.from_json(options.to_json()) == options


@pytest.mark.parametrize("body", ['{"prompt": "x", "colour": 1}', '{"sampling": {"warmth": 1}}'])
def test_unknown_keys_of_a_stored_request_are_refused(body: str) -> None:
    with pytest.raises(TypeError):
        Request.from_body(0, "a", body)


def test_an_outputs_state_follows_from_its_error() -> None:
    key = RequestKey("job", 0)
    assert Output(key, (Choice("x", "stop"),)).state is RequestState.SUCCEEDED
    assert Output.failed(key, ErrorCode.OUT_OF_MEMORY, "x").state is RequestState.FAILED
    assert Output.failed(key, ErrorCode.CANCELLED, "x").state is RequestState.CANCELLED


def test_job_ids_can_be_typed() -> None:
    ids = {new_job_id() for _ in range(1_000)}
    assert len(ids) == 1_000
    assert all(re.fullmatch("[a-hj-km-np-z2-9]{8}", each) for each in ids)


def test_every_state_but_the_first_can_be_entered_and_loading_never_again() -> None:
    assert set(JOB_BEFORE) == set(JobState) - {JobState.LOADING}
    assert set(BATCH_BEFORE) == set(BatchState)
