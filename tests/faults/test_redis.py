"""Redis emptied, killed, gone, silent, cut off in the middle: wake-ups are lost, and no work is."""

from __future__ import annotations

import os
import signal
import time

import pytest

from jobs.spec import ModelSpec
from tests.faults.conftest import SLOW, FaultMill, Pace, ProxiedMill, both_paces, sqlite_first
from tests.integration.conftest import child_of, until, write_prompts

ECHO_QUEUE = ModelSpec.parse("echo").queue
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
        assert mill.queue_length(ECHO_QUEUE) > 0
        client.flushall()
        worker = mill.ready_worker(**SLOW)
        until(lambda: mill.succeeded(job_id) > 20, "some answers")
        client.flushall()
        os.kill(child_of(worker), signal.SIGKILL)
        client.flushall()
    mill.wait(job_id)
    mill.check_ended(job_id, 150)
    until(lambda: mill.queue_length(ECHO_QUEUE) == 0, "the queue is drained", seconds=20)


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
    assert mill.succeeded(first) > done_when_killed + 100, "the running job goes on without Redis"
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
    check_served(mill, seconds=30)
    mill.check_ended(job_id, 250)
    assert worker.poll() is None
    assert mill.repeated() == 0


@sqlite_first
def test_a_wake_up_lost_on_the_way_is_sent_again(proxied_mill: ProxiedMill, database_url: str) -> None:
    mill = proxied_mill
    worker = mill.ready_worker()
    cut = mill.proxy.cut_after_reply(containing=b"batchmill.wake")
    job_id = mill.submit(20)
    assert cut.wait(5), "the worker was sent the wake-up"
    assert mill.queue_length(ECHO_QUEUE) == 0, "Redis holds it no more"
    mill.wait(job_id)
    mill.check_ended(job_id, 20)
    assert worker.poll() is None


@pytest.mark.slow
def test_a_worker_ends_in_order_although_redis_is_frozen(proxied_mill: ProxiedMill) -> None:
    mill = proxied_mill
    worker = mill.ready_worker(**SLOW)
    job_id = mill.submit(200)
    until(lambda: mill.succeeded(job_id) > 20, "some answers")
    mill.server.freeze()
    mill.wait(job_id)
    worker.terminate()
    assert worker.wait(30) == 0
    mill.server.thaw()
    mill.check_ended(job_id, 200)
