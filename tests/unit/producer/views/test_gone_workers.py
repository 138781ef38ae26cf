"""Workers of this machine whose process has ended."""

from __future__ import annotations

from dataclasses import replace
from socket import gethostname

import pytest

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.leases.lease import WorkerSession
from batchmill.jobs.store.store import Store
from batchmill.producer.cli.text.job_lines import job_lines
from batchmill.producer.cli.text.worker_line import worker_line
from batchmill.producer.views.gone_workers import seen_here
from batchmill.producer.views.retries import chances_of
from batchmill.producer.views.status import JobStatus
from tests.support.store import mill


def test_a_worker_of_this_machine_whose_process_has_ended_is_dead_at_once(store: Store, ended_process: Process) -> None:
    live = Process.own()
    job_id = mill.load(store, 3)
    contained = replace(ended_process, namespace=1)
    for name, process in (("lives", live), ("contained", contained), ("ended", ended_process)):
        mill.session(store, name=name, process=process, host=gethostname())
    rows = {each.name: seen_here(each) for each in store.workers.rows()}
    assert {name: each.alive for name, each in rows.items()} == {"ended": False, "lives": True, "contained": True}
    assert worker_line(rows["ended"]).startswith("ended  dead  ")
    assert worker_line(replace(rows["lives"], alive=False)).startswith("lives  silent  ")
    assert worker_line(replace(rows["contained"], alive=False)).startswith("contained  dead  ")
    assert JobStatus.read(store, job_id).missing_seconds is None
    store.registration.enter(rows["lives"].id, WorkerState.STOPPED)
    store.registration.enter(rows["contained"].id, WorkerState.STOPPED)
    assert JobStatus.read(store, job_id).missing_seconds is not None
    assert JobStatus.read(store, job_id).restarting is None
    home = load_settings().home
    home.mkdir(parents=True, exist_ok=True)
    (home / "mill.pid").write_text(f"{live}\n")
    lines = job_lines(JobStatus.read(store, job_id))
    assert "  waiting    worker ended has ended, and the mill here restarts it within a minute;" in lines
    assert "  waiting    if neither `up` nor `run` started it, start it yourself: batchmill worker -m echo" in lines


def test_a_worker_whose_process_has_ended_is_not_at_work(store: Store, ended_process: Process) -> None:
    job_id = mill.load(store, 10)
    for name, process in (("lives", Process.own()), ("ended", ended_process)):
        assert mill.claim(store, mill.session(store, name=name, process=process, host=gethostname()))
    assert len(store.workers.rows(job_id=job_id)) == 2, "the heartbeats of both are fresh"
    assert [each.name for each in JobStatus.read(store, job_id).workers] == ["lives"]


@pytest.mark.parametrize(("is_ended", "context_tokens"), [(False, 128), (True, 0)])
def test_a_worker_whose_process_has_ended_is_no_chance_of_a_retry(
    store: Store, ended_process: Process, is_ended: bool, context_tokens: int
) -> None:
    job_id = mill.load(store, 3)
    mill.work_off(store, mill.session(store, process=ended_process if is_ended else Process.own()))
    chances = chances_of(store.jobs.job(job_id), everything=False, store=store)
    assert chances.context_tokens == context_tokens


class TestUptime:
    """A worker's time up ends where it stopped, was last seen, or is found gone."""

    @pytest.fixture
    def store(self, clocked: Store) -> Store:
        return clocked

    def up(self, store: Store, who: WorkerSession) -> float:
        (row,) = [each for each in store.workers.rows(only_alive=False) if each.id == who.worker_id]
        return seen_here(row).uptime_seconds

    def test_of_a_worker_that_stopped_between_two_heartbeats(self, store: Store, clock: mill.Clock) -> None:
        who = mill.session(store)
        clock.seconds += 7
        assert self.up(store, who) == 7
        store.registration.enter(who.worker_id, WorkerState.STOPPED)
        clock.seconds += 1_000
        assert self.up(store, who) == 7

    def test_of_a_worker_that_is_heard_of_no_more(self, store: Store, clock: mill.Clock) -> None:
        who = mill.session(store)
        clock.seconds += 5
        store.registration.heartbeat(who.worker_id, beat=5.0)
        clock.seconds += 1_000
        assert self.up(store, who) == 5

    def test_of_a_worker_whose_process_is_gone(self, store: Store, clock: mill.Clock, ended_process: Process) -> None:
        who = mill.session(store, process=ended_process)
        clock.seconds += 5
        store.registration.heartbeat(who.worker_id, beat=5.0)
        clock.seconds += 3
        assert self.up(store, who) == 5
