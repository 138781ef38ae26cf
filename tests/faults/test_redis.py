"""Redis emptied, killed, gone, silent, cut off in the middle: wake-ups are lost, and no work is."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from contextlib import closing

import pytest

from batchmill.jobs.requests.states import JobState
from tests.faults.conftest import SLOW, FaultMill, Pace, ProxiedMill, both_paces, sqlite_first
from tests.integration.conftest import PATIENCE_SECONDS, child_of, until, write_prompts

#: A submit that cannot reach Redis gives up by then.
SUBMIT_SECONDS = 45.0


def check_served(mill: FaultMill, *, seconds: float) -> None:
    """A job submitted now is taken up in time, so the workers listen to Redis."""
    job_id = mill.submit(20)
    mill.wait(job_id, seconds=seconds)
    mill.check_ended(job_id, 20)


@sqlite_first
def test_a_flushall_in_mid_job_costs_nothing(proxied_mill: ProxiedMill, database_url: str) -> None:
    mill = proxied_mill
    job_id = mill.submit(150)
    with mill.server.client() as client:
        assert mill.queue_length(mill.echo_queue) > 0
        client.flushall()
        worker = mill.ready_worker(**SLOW)
        until(lambda: mill.succeeded(job_id) > 20, "some answers")
        client.flushall()
        os.kill(child_of(worker), signal.SIGKILL)
        client.flushall()
    mill.wait(job_id)
    mill.check_ended(job_id, 150)
    until(lambda: mill.queue_length(mill.echo_queue) == 0, "the queue is drained")


@both_paces
def test_redis_killed_and_started_empty_is_found_again(proxied_mill: ProxiedMill, pace: Pace) -> None:
    mill = proxied_mill
    worker = mill.ready_worker(**SLOW)
    child = child_of(worker)
    first = mill.submit(pace.requests)
    until(lambda: mill.succeeded(first) > 20, "some answers")
    mill.server.kill()
    done_when_killed = mill.succeeded(first)
    began = time.monotonic()
    done = mill.finished("submit", write_prompts(mill.home / "p.jsonl", 20), "-m", "echo")
    assert done.returncode == 0
    assert "stored" in done.stderr
    assert time.monotonic() - began < SUBMIT_SECONDS
    time.sleep(max(0.0, pace.redis_away_seconds - (time.monotonic() - began)))
    goal = min(done_when_killed + 100, pace.requests)
    assert mill.succeeded(first) >= goal > done_when_killed, "the running job goes on without Redis"
    mill.server.start()
    second = done.stdout.strip()
    for job_id in (first, second):
        mill.wait(job_id, seconds=pace.patience_seconds)
    mill.check_ended(first, pace.requests)
    mill.check_ended(second, 20)
    check_served(mill, seconds=pace.patience_seconds)
    assert worker.poll() is None
    assert child_of(worker) == child
    assert mill.repeated() == 0


@both_paces
def test_a_silent_redis_stops_no_running_job_and_no_submit(proxied_mill: ProxiedMill, pace: Pace) -> None:
    mill = proxied_mill
    worker = mill.ready_worker(**SLOW)
    child = child_of(worker)
    first = mill.submit(pace.requests)
    until(lambda: mill.succeeded(first) > 20, "some answers")
    mill.proxy.blackhole()
    began = time.monotonic()
    done = mill.finished("submit", write_prompts(mill.home / "p.jsonl", 20), "-m", "echo")
    took = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert "stored" in done.stderr
    assert took < SUBMIT_SECONDS
    mill.wait(first, seconds=pace.patience_seconds)
    assert mill.ready(), "heartbeats go on"
    mill.proxy.heal()
    second = done.stdout.strip()
    for job_id in (first, second):
        mill.wait(job_id, seconds=pace.patience_seconds)
    mill.check_ended(first, pace.requests)
    mill.check_ended(second, 20)
    check_served(mill, seconds=pace.patience_seconds)
    assert worker.poll() is None
    assert child_of(worker) == child
    assert mill.repeated() == 0


def test_connections_reset_again_and_again_cost_nothing(proxied_mill: ProxiedMill) -> None:
    mill = proxied_mill
    worker = mill.ready_worker(**SLOW)
    job_id = mill.submit(250)
    while mill.succeeded(job_id) < 250:
        mill.proxy.reset()
        time.sleep(0.5)
    mill.wait(job_id)
    check_served(mill, seconds=PATIENCE_SECONDS)
    mill.check_ended(job_id, 250)
    assert worker.poll() is None
    assert mill.repeated() == 0


@sqlite_first
def test_a_wake_up_lost_on_the_way_is_sent_again(proxied_mill: ProxiedMill, database_url: str) -> None:
    mill = proxied_mill
    worker = mill.ready_worker()
    cut = mill.proxy.cut_after_reply(containing=b"batchmill.wake")
    job_id = mill.submit(20)
    assert cut.wait(PATIENCE_SECONDS), "the worker was sent the wake-up"
    assert mill.queue_length(mill.echo_queue) == 0, "Redis holds it no more"
    mill.wait(job_id)
    mill.check_ended(job_id, 20)
    assert worker.poll() is None


@sqlite_first
def test_without_redis_workers_find_their_work_by_themselves(proxied_mill: ProxiedMill, database_url: str) -> None:
    """One that was there before Redis died, and one that starts without it; then Redis is back, and both listen."""
    mill = proxied_mill
    workers = [mill.ready_worker("--name", "before", **SLOW)]
    mill.server.kill()
    workers.append(mill.ready_worker("--name", "after", **SLOW))
    job_id = mill.submit(200)
    mill.wait(job_id)
    mill.check_ended(job_id, 200)
    mill.server.start()
    check_served(mill, seconds=PATIENCE_SECONDS)
    assert [each.poll() for each in workers] == [None, None]
    assert mill.repeated() == 0


@pytest.mark.parametrize(
    ("setting", "broken", "whole"),
    [("maxmemory", "1", "0"), ("requirepass", "new", "")],
    ids=["full", "a new password"],
)
def test_a_redis_that_refuses_is_done_without(proxied_mill: ProxiedMill, setting: str, broken: str, whole: str) -> None:
    mill = proxied_mill
    worker = mill.ready_worker(**SLOW)
    with mill.server.client() as client:
        client.config_set(setting, broken)
        mill.proxy.reset()
        done = mill.finished("submit", write_prompts(mill.home / "p.jsonl", 50), "-m", "echo")
        assert done.returncode == 0, done.stderr
        assert "stored" in done.stderr
        mill.wait(done.stdout.strip())
        mill.check_ended(done.stdout.strip(), 50)
        client.config_set(setting, whole)
    check_served(mill, seconds=PATIENCE_SECONDS)
    assert worker.poll() is None
    assert "Traceback" not in mill.log_of(worker)


def test_a_child_that_dies_while_redis_is_away_is_replaced(proxied_mill: ProxiedMill) -> None:
    mill = proxied_mill
    worker = mill.ready_worker(**SLOW)
    mill.server.kill()
    until(lambda: "no connection to Redis; it is tried again" in mill.log_of(worker), "the worker looks for Redis")
    for deaths in range(1, 4):
        os.kill(child_of(worker), signal.SIGKILL)
        until(lambda deaths=deaths: mill.log_of(worker).count("] ready ") > deaths, "another child is ready")
    job_id = mill.submit(100)
    mill.wait(job_id)
    mill.check_ended(job_id, 100)
    assert worker.poll() is None
    mill.server.start()
    check_served(mill, seconds=PATIENCE_SECONDS)


def test_work_that_no_wake_up_told_of_is_handed_back_at_the_end(proxied_mill: ProxiedMill) -> None:
    """Also where that takes longer than Celery leaves to a process without a task: the store is locked meanwhile."""
    mill = proxied_mill
    mill.server.kill()
    worker = mill.ready_worker(echo_step_seconds=5.0, engine_rows=10)
    job_id = mill.submit(100)
    until(lambda: mill.store.jobs.job(job_id).state is JobState.RUNNING, "it is at work")
    with closing(sqlite3.connect(mill.home / "batchmill.db", isolation_level=None, timeout=10)) as other:
        other.execute("BEGIN EXCLUSIVE")
        worker.terminate()
        time.sleep(3.0)
        other.execute("ROLLBACK")
    assert worker.wait(PATIENCE_SECONDS) == 0
    assert "out of work" in mill.log_of(worker), "it ended its work in order"
    assert mill.store.recovery.expired(lease_seconds=-1_000) == {}, "the rest is handed back"
    assert mill.repeated() == 0
    mill.ready_worker()
    mill.wait(job_id)
    mill.check_ended(job_id, 100)


def test_wake_ups_that_come_while_a_worker_does_what_it_found_start_no_second_loop(proxied_mill: ProxiedMill) -> None:
    mill = proxied_mill
    mill.server.kill()
    worker = mill.ready_worker(echo_step_seconds=0.2, engine_rows=10)
    job_id = mill.submit(300)
    until(lambda: mill.succeeded(job_id) > 20, "some answers")
    mill.server.start()
    until(lambda: mill.queue_length(mill.echo_queue) == 0 and mill.succeeded(job_id) > 100, "wake-ups were taken")
    for _ in range(3):
        mill.server.kill()
        mill.server.start()
    mill.wait(job_id)
    mill.check_ended(job_id, 300)
    check_served(mill, seconds=PATIENCE_SECONDS)
    assert "Traceback" not in mill.log_of(worker)
    assert mill.repeated() == 0


@pytest.mark.slow
def test_a_worker_ends_in_order_although_redis_is_frozen(proxied_mill: ProxiedMill) -> None:
    mill = proxied_mill
    worker = mill.ready_worker(**SLOW)
    job_id = mill.submit(200)
    until(lambda: mill.succeeded(job_id) > 20, "some answers")
    mill.server.freeze()
    mill.wait(job_id)
    worker.terminate()
    assert worker.wait(PATIENCE_SECONDS) == 0
    mill.server.thaw()
    mill.check_ended(job_id, 200)
