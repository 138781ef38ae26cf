"""Kinds of requests: a new one costs a file for each side and an engine, and workers take what their engines serve."""

from __future__ import annotations

import csv
import json
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from batchmill.jobs.configuration.settings import Settings, load_settings
from batchmill.jobs.errors import BatchmillError, PromptFileError, UsageError
from batchmill.jobs.models.device_memory import Memory
from batchmill.jobs.requests import kinds as jobs_kinds
from batchmill.jobs.requests.generation import GenerationOptions, SamplingParams
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.jobs.requests.states import JobState
from batchmill.jobs.store.leases.lease import BatchReport, Lease, WorkerSession
from batchmill.jobs.store.store import Store
from batchmill.producer.files.export import export
from batchmill.producer.requests import kinds as producer_kinds
from batchmill.producer.submission import Submission
from batchmill.producer.submit import load_job
from batchmill.producer.views.public_json import status_json
from batchmill.producer.views.status import JobStatus
from batchmill.worker.loop.runner import Runner
from batchmill.worker.loop.saver import Saver
from batchmill.worker.loop.spool import NewerSpool, Spool, read
from tests.support.store import mill
from tests.support.store.oracle import violations
from tests.support.toy_kind import jobs_side, producer_side
from tests.support.toy_kind.engine.engine import CountEngine

LINES = (
    {"sentence": "one two three", "custom_id": "short"},
    {"url": "/v1/counts", "custom_id": "long", "body": {"sentence": "four-five six", "user": "me"}},
    {"sentence": "seven"},
)


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(jobs_kinds.KINDS, "count", jobs_side.COUNT)
    monkeypatch.setitem(producer_kinds.FORMS, "count", producer_side.COUNT)


@pytest.fixture
def settings(store_url: str) -> Settings:
    return load_settings(database_url=store_url)


def submit(store: Store, settings: Settings, *lines: object, options: GenerationOptions | None = None) -> str:
    path = Path("p.jsonl")
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    submission = Submission(str(path), "echo", options=options or GenerationOptions(), batch_size=2)
    return load_job(submission, store=store, settings=settings)[0]


def counting(store: Store, *, name: str = "counts", ready: bool = True) -> WorkerSession:
    """A worker whose engine serves the kind of the test alone."""
    return replace(mill.session(store, name=name, ready=ready, kinds=CountEngine.kinds), defaults=" ")


def work(store: Store, session: WorkerSession, engine: CountEngine, folder: Path) -> None:
    """Claims, steps and saves until nothing is pending."""
    saver = Saver(
        store,
        replace(session, defaults=engine.defaults),
        rows=engine.limits.rows,
        admission_order=engine.admission_order,
        save_seconds=0.05,
        peak=Memory,
        wake=lambda: None,
        drain=threading.Event(),
        spool=Spool(folder / "spool" / "1.jsonl", limit_bytes=100_000),
        capacity_of="host/cpu",
    )
    saver.start()
    Runner(engine, saver, watching=nullcontext).run()  # type: ignore[arg-type]


def written(store: Store, job_id: str, out: str) -> str:
    form = {"a.jsonl": "jsonl", "o.jsonl": "openai", "a.csv": "csv"}[out]
    assert export(store, store.jobs.job(job_id), out=Path(out), form=form, only="all").count == len(LINES)
    return Path(out).read_text()


@pytest.mark.usefixtures("_registered")
class TestToyKind:
    """A kind that counts words, from a prompt file through the store and its engine to an export."""

    def test_it_goes_the_whole_way(self, store: Store, settings: Settings, tmp_path: Path) -> None:
        job_id = submit(store, settings, *LINES)
        work(store, counting(store), CountEngine(), tmp_path)
        job = store.jobs.job(job_id)
        assert (job.state, job.kind, job.counts.succeeded) == (JobState.COMPLETED, "count", 3)
        assert (job.sampling, job.counts.finish_reasons) == ({"separator": " "}, None)
        lines = [json.loads(line) for line in written(store, job_id, "a.jsonl").splitlines()]
        assert [(line["custom_id"], line["words"]) for line in lines] == [("short", 3), ("long", 2), ("request-2", 1)]
        assert lines[0].keys() == {
            "index", "custom_id", "words", "prompt_tokens", "completion_tokens", "error"
        }  # fmt: skip
        bodies = [json.loads(line)["response"]["body"] for line in written(store, job_id, "o.jsonl").splitlines()]
        assert [(body["object"], body["words"]) for body in bodies] == [("count", 3), ("count", 2), ("count", 1)]
        rows = list(csv.DictReader(written(store, job_id, "a.csv").splitlines()))
        assert [row["words"] for row in rows] == ["3", "2", "1"]
        assert violations(store) == []
        assert list(store.checking.findings([job_id])) == []

    def test_what_its_first_worker_settled_holds_for_the_next(
        self, store: Store, settings: Settings, tmp_path: Path
    ) -> None:
        job_id = submit(store, settings, *LINES)
        first = replace(counting(store), defaults="-")
        (begun,) = mill.claim(store, first)
        mill.save(store, first, [BatchReport(begun.lease, release=True)])
        work(store, counting(store, name="next"), CountEngine(), tmp_path)
        lines = [json.loads(line) for line in written(store, job_id, "a.jsonl").splitlines()]
        assert [line["words"] for line in lines] == [1, 2, 1]

    def test_a_worker_takes_the_kinds_that_its_engine_serves(self, store: Store, settings: Settings) -> None:
        older, younger = submit(store, settings, *LINES), mill.load(store, 4)
        generates, counts = mill.session(store), counting(store)
        assert {each.lease.job_id for each in mill.claim(store, generates, wanted=9)} == {younger}
        assert mill.claim(store, generates, wanted=9) == ()
        claimed = mill.claim(store, counts, wanted=9)
        assert {(each.lease.job_id, each.lease.kind) for each in claimed} == {(older, "count")}

    def test_a_worker_is_woken_for_what_it_may_take(self, store: Store, settings: Settings) -> None:
        submit(store, settings, *LINES)
        generates = mill.session(store)
        assert store.recovery.pending_of(mill.ECHO_SPEC, most=9, worker_id=generates.worker_id) == []
        assert store.recovery.pending(most=9) == {}
        counts = counting(store)
        assert len(store.recovery.pending_of(mill.ECHO_SPEC, most=9, worker_id=counts.worker_id)) == 2

    def test_nothing_is_kept_for_an_idle_worker_that_cannot_take_it(self, store: Store) -> None:
        counting(store)
        job_id = mill.load(store, 8, batch_size=4)
        claimed = mill.claim(store, mill.session(store), wanted=8)
        assert [each.lease.job_id for each in claimed] == [job_id] * 2

    def test_a_file_holds_one_kind(self, store: Store, settings: Settings) -> None:
        with pytest.raises(PromptFileError) as caught:
            submit(store, settings, LINES[0], {"prompt": "hello"}, LINES[1], {"messages": [HELLO]})
        said = "is a request of kind generation, and the file's first is one of kind count; put each kind into a file"
        places = [each.partition(f": {said}")[::2] for each in caught.value.problems]
        assert [(place, rest != "") for place, rest in places] == [("p.jsonl:2", True), ("p.jsonl:4", True)]
        assert mill.rows(store, "jobs") == 0

    def test_flags_of_another_kind_are_refused(self, store: Store, settings: Settings) -> None:
        options = GenerationOptions("be brief", SamplingParams(top_k=1))
        with pytest.raises(UsageError, match="requests of kind count, for which no flag sets system, top_k"):
            submit(store, settings, *LINES, options=options)
        assert mill.rows(store, "jobs") == 0

    def test_a_line_of_no_kind_is_told_what_there_is(self, store: Store, settings: Settings) -> None:
        with pytest.raises(PromptFileError) as caught:
            submit(store, settings, {"text": "hello"}, {"url": "/v1/nothing", "body": {}})
        first, second = caught.value.problems
        assert first.endswith("holds no prompt, no messages, no sentence, and no url and body of an OpenAI Batch line")
        assert "/v1/chat/completions, /v1/completions, /v1/counts" in second

    def test_a_spool_names_its_kind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "spool" / "x-1-1.jsonl"
        output = Output(RequestKey("job", 0), (jobs_side.Count(3),), 1)
        held = BatchReport(Lease(3, 1, 5, "job", kind="count"), outputs=[output], in_flight=[])
        Spool(path, limit_bytes=10_000).append([held])
        assert read(path) == [held]
        monkeypatch.delitem(jobs_kinds.KINDS, "count")
        with pytest.raises(NewerSpool):
            read(path)


HELLO = {"role": "user", "content": "hello"}


@pytest.fixture
def job_id(store: Store) -> str:
    return mill.load(store, 2)


def test_a_job_is_a_generation_where_nothing_else_is_said(store: Store, job_id: str, settings: Settings) -> None:
    assert store.jobs.job(job_id).kind == "generation"
    assert status_json(JobStatus.read(store, job_id, settings))["kind"] == "generation"


@pytest.mark.parametrize("named", [jobs_kinds.kind_named, producer_kinds.forms_of])
def test_a_kind_of_another_batchmill_is_named(named: object) -> None:
    with pytest.raises(BatchmillError, match="kind 'count': use the one that"):
        named("count")  # type: ignore[operator]


def test_both_sides_have_the_same_kinds() -> None:
    assert jobs_kinds.KINDS.keys() == producer_kinds.FORMS.keys()
