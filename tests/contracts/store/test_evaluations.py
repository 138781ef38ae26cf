"""The store of evaluations: the last one of exactly a ModelSpec, and what status shows of it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from batchmill.jobs.models.quantization import Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.evaluations import DataFile
from batchmill.producer.cli.text.job_lines import job_lines
from batchmill.producer.views.public_json import status_json
from batchmill.producer.views.status import JobStatus
from tests.support.store import mill

NF4 = ModelSpec("demo")
NONE = ModelSpec("demo", None, Quantization.parse("none"))
DATA = DataFile("held-out.jsonl", "0" * 64)


def measured(**given: Any) -> dict[str, Any]:
    return {"perplexity": 8.4, "baseline_perplexity": 8.0, "accuracy": None} | given


def add(
    store: Store,
    spec: ModelSpec,
    baseline: ModelSpec | None = NONE,
    *,
    identity: str = mill.IDENTITY,
    **given: Any,
) -> None:
    store.evaluations.add(
        spec,
        identity=identity,
        baseline=baseline,
        data=DATA,
        device_name="cpu",
        measured=measured(**given),
        versions={"batchmill": "1"},
    )


def test_the_last_evaluation_of_a_spec_is_found_as_it_was_kept(store: Store) -> None:
    add(store, NF4, perplexity=9.0)
    add(store, NF4, accuracy={"right": 3, "answers": 4})
    add(store, NONE)
    row = store.evaluations.latest(NF4)
    assert row is not None
    assert (row.spec, row.baseline, row.data, row.device_name) == (NF4, NONE, DATA, "cpu")
    assert row.measured == measured(accuracy={"right": 3, "answers": 4})
    assert row.versions == {"batchmill": "1"}
    with store.database.read() as connection:
        assert 0 <= connection.scalar(select(store.database.now)) - row.created_at < 60


def test_another_quantization_or_model_has_no_evaluation(store: Store) -> None:
    add(store, NF4)
    for other in (NONE, ModelSpec("other"), ModelSpec("demo", None, Quantization.parse("nf4:double_quant=false"))):
        assert store.evaluations.latest(other) is None


def test_a_job_shows_what_its_model_was_measured_to_cost(store: Store) -> None:
    job_id = mill.load(store, spec=NF4)
    assert status_json(JobStatus.read(store, job_id))["evaluation"] is None
    assert "evaluated" not in "\n".join(job_lines(JobStatus.read(store, job_id)))
    add(store, NF4, accuracy={"right": 63, "answers": 64})
    said = status_json(JobStatus.read(store, job_id))["evaluation"]
    assert list(said) == ["baseline", "data", "device", "measured", "versions", "created_at"]
    assert (said["baseline"], said["data"]) == ("none", {"name": DATA.name, "sha256": DATA.sha256})
    assert said["measured"]["perplexity"] == 8.4
    expected = "  evaluated  perplexity 8.4000 (+5.0% against none), 63 of 64 answers right, with held-out.jsonl on cpu"
    assert expected in job_lines(JobStatus.read(store, job_id))


def test_a_baseline_is_not_compared_with_itself(store: Store) -> None:
    job_id = mill.load(store, spec=NONE)
    add(store, NONE)
    assert "  evaluated  perplexity 8.4000, with held-out.jsonl on cpu" in job_lines(JobStatus.read(store, job_id))
    add(store, NONE, baseline=None, baseline_perplexity=None)
    assert status_json(JobStatus.read(store, job_id))["evaluation"]["baseline"] is None


def test_what_another_model_cost_is_not_shown(store: Store) -> None:
    job_id = mill.load(store, spec=NF4)
    add(store, NF4, identity="weights=old")
    assert JobStatus.read(store, job_id).evaluation is not None  # nobody has begun it
    mill.claim(store, mill.session(store, spec=NF4, identity="weights=new"))
    assert JobStatus.read(store, job_id).evaluation is None
    add(store, NF4, identity="weights=new", perplexity=7.0)
    add(store, NF4, identity="weights=old")
    shown = JobStatus.read(store, job_id).evaluation
    assert shown is not None
    assert shown.measured["perplexity"] == 7.0
