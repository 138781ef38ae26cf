"""An upgrade of a store at work: processes that block it, rows that it rewrites, and answers given meanwhile."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import create_engine, insert, text
from sqlalchemy.engine import make_url

from batchmill.jobs.configuration.settings import Settings, load_settings
from batchmill.jobs.errors import AlreadyRunning
from batchmill.jobs.requests.states import JobState, RequestState
from batchmill.jobs.runtime.process.pid_file import PidFile
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import REVISION, metadata
from batchmill.migrations import revisions
from batchmill.worker.process.maintenance.leftovers import Leftovers
from tests.support.store import mill, old_store
from tests.support.store.oracle import violations

#: The revision of commit 480f1b7.
FIRST = "0004"
#: Its column `choices` is the one that this revision renames.
BEFORE = "0011"
_LASTS = "UPDATE batches SET lease_until = lease_until + 100000 WHERE state = 'leased'"


@pytest.fixture
def settings() -> Settings:
    settings = load_settings()
    settings.home.mkdir(parents=True)
    return settings


def at_work(settings: Settings, *, revision: str, lasts: bool, process: Process | None = None) -> None:
    """An embedded store of this revision, of which a worker holds leases."""
    old_store.build(settings.database, revision=revision)
    with sqlite3.connect(settings.database_file) as connection:
        if lasts:
            connection.execute(_LASTS)
        if process is not None:
            connection.execute("UPDATE workers SET process = ? WHERE state = 'ready'", (str(process),))


def refusal(settings: Settings) -> str:
    with pytest.raises(AlreadyRunning) as caught:
        revisions.open_store(settings)
    with sqlite3.connect(settings.database_file) as connection:
        (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    assert revision != REVISION
    assert list(settings.home.glob("batchmill.0*.db")) == []
    return str(caught.value)


def own() -> Process:
    process = Process.own()
    assert process is not None
    return process


@pytest.mark.parametrize("revision", [FIRST, BEFORE])
def test_it_is_refused_while_a_lease_lasts(settings: Settings, revision: str) -> None:
    at_work(settings, revision=revision, lasts=True)
    said = refusal(settings)
    assert "a worker of an older batchmill is at work on it: w1 (pid 1 on host); end it by `kill 1`," in said
    assert "or wait 99" in said


def test_it_goes_on_once_the_leases_are_over(settings: Settings) -> None:
    at_work(settings, revision=FIRST, lasts=False)
    revisions.open_store(settings).close()


def test_a_worker_that_lives_ends_by_its_mill(settings: Settings) -> None:
    at_work(settings, revision=BEFORE, lasts=False, process=own())
    assert "end it by `kill 1`, upon which it saves its answers and hands the rest back" in refusal(settings)
    PidFile(settings.home / "mill.pid").write(own().pid)
    said = refusal(settings)
    assert f"end it by `kill {own().pid}`" in said
    assert "or wait" not in said


def test_a_worker_that_is_dead_stands_in_no_ones_way(settings: Settings) -> None:
    at_work(settings, revision=BEFORE, lasts=True, process=replace(own(), start_ticks=own().start_ticks - 1))
    revisions.open_store(settings).close()


def test_finished_answers_in_a_spool_of_before_are_taken_over(old_url: str) -> None:
    """As commit 480f1b7 wrote it, under the name that the URL of its store has."""
    old_store.build(old_url, revision=FIRST)
    engine = create_engine(make_url(old_url))
    with engine.connect() as connection:
        leases = "SELECT b.id, r.id, b.job_id FROM batches b JOIN runs r ON r.batch_id = b.id WHERE b.state = 'leased'"
        held = connection.execute(text(leases + " ORDER BY b.id")).all()
    engine.dispose()
    settings = load_settings(database_url=old_url)
    folder = settings.home / "spool"
    folder.mkdir(parents=True)
    name = hashlib.sha256(settings.database.encode()).hexdigest()[:8]
    lines = [
        {
            "lease": [batch_id, 1, run_id, job_id, False],
            "in_flight": [],
            "outputs": [
                {
                    "key": [job_id, {"running": 3, "cancelling": 2}[job_id]],
                    "choices": [{"text": f"late {job_id}", "finish_reason": "length", "logprobs": None}],
                    "prompt_tokens": 2,
                    "completion_tokens": 3,
                    "error": None,
                    "timings": {"queued_seconds": 0.5, "prefill_seconds": 0.25, "decode_seconds": 1.0},
                }
            ],
        }
        for batch_id, run_id, job_id in held
    ]
    assert len(lines) == 2
    (folder / f"{name}-1-1.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    revisions.upgrade(old_url)
    store = Store(old_url, busy_seconds=10)
    Leftovers(store, settings).settle_orphans()  # as a new worker does first
    assert list(folder.iterdir()) == []
    for job_id, index in (("running", 3), ("cancelling", 2)):
        ((*rows,),) = store.jobs.output_pages(job_id, states=frozenset(RequestState), page=9)
        (late,) = (row for row in rows if row.index == index)
        assert late.payload == f'[{{"text":"late {job_id}","finish_reason":"length"}}]'
        assert late.decode_seconds == 1.0
    assert store.jobs.job("cancelling").state is JobState.CANCELLED
    assert violations(store, closed=False) == []
    store.close()


@pytest.fixture
def many(old_url: str) -> str:
    """A store of before, with a thousand answers of a KiB each."""
    old_store.build(old_url, revision=BEFORE)
    engine = create_engine(make_url(old_url))
    with engine.begin() as connection:
        batch_id = connection.execute(text("SELECT min(id) FROM batches WHERE job_id = 'completed'")).scalar_one()
        places = [{"job_id": "completed", "index": 10 + index} for index in range(1_000)]
        more = [each | {"custom_id": f"more-{each['index']}", "batch_id": batch_id, "body": "{}"} for each in places]
        connection.execute(insert(metadata.tables["requests"]), more)
        row = """INSERT INTO outputs (job_id, "index", state, choices, prompt_tokens, completion_tokens, finished_at)
                 VALUES (:job_id, :index, 'succeeded', :choices, 1, 1, 1)"""
        connection.execute(text(row), [each | {"choices": json.dumps([{"text": "x" * 1024}])} for each in places])
    engine.dispose()
    return old_url


def test_a_rename_rewrites_nothing(many: str) -> None:
    before = _places_of_rows(many)
    revisions.upgrade(many)
    after = _places_of_rows(many)
    assert len(before) > 250
    assert len(before - after) < 30  # the catalogue, and the rows of the small tables


def _places_of_rows(url: str) -> set[object]:
    """The marks of rows that were written again: PostgreSQL's places of outputs, or the pages of a SQLite file."""
    engine = create_engine(make_url(url))
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            rows = text("SELECT pg_relation_filenode('outputs') AS file, ctid::text, xmin::text FROM outputs")
            found: set[object] = {tuple(row) for row in connection.execute(rows)}
        else:
            connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
            (size,) = connection.execute(text("PRAGMA page_size")).one()
            file = Path(str(make_url(url).database)).read_bytes()
            found = {(place, file[place : place + size]) for place in range(0, len(file), size)}
    engine.dispose()
    return found


def test_new_workers_go_on_with_what_older_ones_left(many: str) -> None:
    revisions.upgrade(many)
    store = Store(many, busy_seconds=10)
    assert {each.kind for each in store.jobs.jobs(most=9)} == {"generation"}
    claimed = mill.claim(store, mill.session(store))
    assert [each.lease.job_id for each in claimed] == ["queued"]
    store.close()
