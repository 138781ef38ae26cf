"""Lines of a job for people."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import select, update

from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.generation import GenerationOptions, SamplingParams
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import jobs, runs
from batchmill.producer.cli.text.job_lines import job_lines, seconds_line
from batchmill.producer.views.public_json import status_json
from batchmill.producer.views.reasons import missing_lines
from batchmill.producer.views.status import JobStatus
from tests.support.json_shape import check_shape
from tests.support.store import mill


def test_an_option_with_a_structure_of_its_own_is_shown_as_json_and_cut_short(store: Store) -> None:
    schema = {"type": "object", "description": "x" * 1_000}
    options = GenerationOptions(None, SamplingParams(n=2, response_format={"type": "json_schema", "schema": schema}))
    job_id = mill.load(store, 1, options=options)
    mill.claim(store, mill.session(store))
    (line,) = [each for each in job_lines(JobStatus.read(store, job_id)) if each.startswith("  sampling")]
    assert 'n 2, response_format {"type": "json_schema", "schema": {"type": "object", "d' in line
    assert len(line) < 500


def test_the_waiting_for_torch_and_for_the_model_are_told_where_the_job_waited(store: Store) -> None:
    spec = ModelSpec.parse("demo")
    job_id = mill.load(store, 3, spec=spec)
    who = mill.session(store, spec=spec)
    store.registration.imported(who.worker_id, who.generation, seconds=4.0)
    mill.claim(store, who)

    def said(*, began: float, queued: float) -> str:
        """The line where the load began, and the job was queued, so long before its first run."""
        with store.database.write() as connection:
            started = connection.scalar(select(runs.c.started_at)) or 0.0
            connection.execute(update(runs).values(loading_since=started - began))
            connection.execute(update(jobs).values(queued_at=started - queued))
        return seconds_line(JobStatus.read(store, job_id))

    assert said(began=5, queued=6).startswith("6.0 queued, of which 4.0 importing torch, 0.5 loading the model; ")
    assert said(began=5, queued=3).startswith("3.0 queued, of which 2.0 importing torch, 0.5 loading the model; ")
    assert said(began=60, queued=3).startswith("3.0 queued; "), "the model was there before"
    store.registration.child_died(who.worker_id, who.generation)
    store.registration.new_generation(who.worker_id, child_pid=3)
    told = said(began=5, queued=6)
    assert told.startswith("6.0 queued, of which 4.0 importing torch, 0.5 loading the model; "), "another child loads"


def test_a_job_that_nobody_serves_says_who_is_missing(store: Store) -> None:
    status = JobStatus.read(store, mill.load(store, 3))
    assert status.missing_seconds is not None
    text = "\n".join(job_lines(status))
    assert "  waiting    no worker serves echo (none) yet; start one:\n" in text
    assert "batchmill up -m echo" in text


def test_an_adapter_that_nobody_holds_is_named_with_the_command(store: Store) -> None:
    job_id = mill.load_named(store, "sql", "x")
    mill.work_off(store, mill.session(store, adapters=[Adapter("x", "org/x", "v1")]))
    status = JobStatus.read(store, job_id)
    assert missing_lines(status) == [
        "1 batch waits for the adapter sql, which no live worker holds",
        "start a worker that holds it: batchmill up -m echo --adapter sql=PATH_OR_ID",
    ]
    text = "\n".join(job_lines(status))
    assert "  adapters   sql (not used yet), x = org/x@v1\n" in text
    assert "  waiting    start a worker that holds it: batchmill up" in text
    said = status_json(status)
    assert said["adapters"] == {"sql": None, "x": {"path": "org/x", "revision": "v1", "identity": None}}
    assert said["missing_adapters"] == ["sql"]
    store.closing.cancel(job_id)
    assert missing_lines(JobStatus.read(store, job_id)) == []


@pytest.mark.parametrize(
    ("state", "said", "advice"),
    [
        (WorkerState.SICK, "worker w on host (cpu) is sick: Xid 79 fell off the bus;", "check its device"),
        (WorkerState.FAILED, "worker w on host (cpu) could not load the model: Xid 79 fell", "fix that"),
    ],
)
def test_where_all_workers_gave_up_the_reason_is_given(
    store: Store, state: WorkerState, said: str, advice: str
) -> None:
    job_id = mill.load(store, 3)
    store.registration.enter(mill.session(store).worker_id, state, error="Xid 79\nfell off the bus")
    status = JobStatus.read(store, job_id)
    assert status.missing_seconds is not None
    text = "\n".join(job_lines(status))
    assert re.search(r"no live worker has served echo \(none\) for \d+ s:", text)
    assert said in text
    assert advice in text
    assert "then start it again: batchmill up -m echo" in text
    check_shape(
        status_json(status)["given_up"][0],
        {"name": str, "host": str, "device": str, "state": str, "error": str},
    )


def test_a_sick_worker_beside_a_good_one_keeps_nobody_waiting(store: Store) -> None:
    job_id = mill.load(store, 3)
    store.registration.enter(mill.session(store).worker_id, WorkerState.SICK, error="Xid 79")
    mill.session(store)
    status = JobStatus.read(store, job_id)
    assert (status.missing_seconds, missing_lines(status)) == (None, [])
    assert "Xid 79" not in "\n".join(job_lines(status))


def test_the_lines_for_people_name_what_counts(store: Store, half_done: str) -> None:
    text = "\n".join(job_lines(JobStatus.read(store, half_done)))
    assert f"job {half_done} (nightly): running" in text
    assert "10 = 2 succeeded + 2 failed + 0 cancelled + 6 pending" in text
    assert "temperature 0.0" in text
    assert "at work    w on host, cpu" in text


def test_early_lines_leave_out_what_nothing_is_known_of(store: Store) -> None:
    job_id = mill.load(store, 8)
    mill.claim(store, mill.session(store), wanted=4, room=8)
    text = "\n".join(job_lines(JobStatus.read(store, job_id)))
    assert "  seconds  " in text
    assert "  memory  " not in text
    assert "  speed  " not in text
