"""Findings about workers: nobody serves a job, nobody holds its adapter, or those that could take it do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from socket import gethostname

import pytest

from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.states import RunOutcome, WorkerState
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.leases.lease import BatchReport
from batchmill.producer.views.diagnosis.snapshot import QueueState
from batchmill.producer.views.diagnosis.verdict import Verdict, diagnose
from batchmill.producer.views.status import JobStatus
from tests.support.diagnosis import AWAY, LLAMA, START, Place, expect, finding
from tests.support.store import mill


class TestAdapters:
    def test_the_adapter_that_nobody_holds_is_named_with_the_command(self, place: Place) -> None:
        job_id = mill.load_named(place.store, "sql", "sql", "x", batch_size=1)
        mill.session(place.store, adapters=[Adapter("x", "/x")])
        mill.claim(place.store, mill.session(place.store, name="other", adapters=[Adapter("x", "/x")]))
        place.store.registration.enter(2, WorkerState.STOPPED)
        place.store.recovery.take_back(2, generation=1, outcome=RunOutcome.RELEASED)
        reason = finding(place.diagnose(job_id), "adapter_missing")
        assert reason.message == "2 batches wait for the adapter sql, which no live worker holds"
        assert reason.remedy == f"start a worker that holds it: {START} --adapter sql=PATH_OR_ID"
        assert not reason.stuck  # a worker is there for the third batch
        mill.work_off(place.store, mill.session(place.store, name="third", adapters=[Adapter("x", "/x")]))
        expect(place.diagnose(job_id), Verdict.STUCK, "adapter_missing")
        mill.session(place.store, name="fourth", ready=False, adapters=[Adapter("sql", "org/sql")])
        expect(place.diagnose(job_id), Verdict.WAITING, "loading_model")

    def test_an_adapter_that_means_another_one_here_is_told_from_it(self, place: Place) -> None:
        job_id = mill.load_named(place.store, "sql", "sql", batch_size=1)
        first = mill.session(place.store, adapters=[Adapter("sql", "org/sql", "v1")])
        mill.save(place.store, first, [mill.answered(mill.claim(place.store, first)[0])])
        place.later(30)
        mill.session(place.store, name="newer", adapters=[Adapter("sql", "/b")])
        reason = expect(place.diagnose(job_id), Verdict.STUCK, "adapter_missing")
        assert reason.message.endswith(": this job means org/sql@v1, and worker newer on host holds /b under that name")
        assert reason.remedy.endswith("--adapter sql=org/sql@v1")

    def test_idle_workers_without_the_adapter_are_not_said_to_be_late(self, place: Place) -> None:
        job_id = mill.load_named(place.store, "sql", "x", batch_size=1)
        busy = mill.session(place.store, adapters=[Adapter("x", "/x"), Adapter("sql", "/s")])
        mill.load_named(place.store, "sql")
        (claimed,) = mill.claim(place.store, busy)
        idle = mill.session(place.store, name="idle")
        for _ in range(10):
            place.later(15, busy, idle)
            mill.save(place.store, busy, [BatchReport(claimed.lease)])
        codes = [each.code for each in place.diagnose(job_id).findings]
        assert "not_claimed" not in codes
        assert "adapter_missing" not in codes

    def test_without_any_worker_the_command_names_the_adapters(self, place: Place) -> None:
        job_id = mill.load_named(place.store, "sql", "x", None)
        reason = expect(place.diagnose(job_id), Verdict.STUCK, "no_worker")
        assert reason.remedy == f"start one: {START} --adapter sql=PATH_OR_ID --adapter x=PATH_OR_ID"


class TestNobodyServes:
    def test_no_worker_names_the_command(self, place: Place) -> None:
        job_id = mill.load(place.store, 30)
        place.later(60)
        reason = expect(place.diagnose(job_id), Verdict.STUCK, "no_worker")
        assert "no live worker serves echo (none), for 1 min 0 s" in reason.message
        assert reason.remedy == f"start one: {START}"

    def test_without_the_embedded_redis_the_whole_mill_is_to_be_started(self, place: Place) -> None:
        diagnosis = place.diagnose(mill.load(place.store, 3), AWAY, external=False)
        assert expect(diagnosis, Verdict.STUCK, "no_worker").remedy == "start one: batchmill up -m echo"

    def test_a_typo_shows_as_a_near_miss(self, place: Place) -> None:
        job_id = mill.load(place.store, 3, spec=LLAMA)
        mill.session(place.store, name="near", spec=ModelSpec("org/Llama", "v2", Quantization(Kind.INT8)))
        mill.session(place.store, name="far", spec=ModelSpec("org/other", None, Quantization(Kind.NF4)))
        diagnosis = place.diagnose(job_id)
        expect(diagnosis, Verdict.STUCK, "no_worker")
        near = finding(diagnosis, "near_miss")
        assert "worker near on host (cpu) holds org/Llama@v2 (int8), and this job needs org/llama (nf4)" in near.message
        assert near.remedy.endswith("submit again with -m org/Llama -q int8 --revision v2")
        assert "far" not in "\n".join(diagnosis.lines())

    def test_a_worker_of_another_job_alone_does_not_count(self, place: Place) -> None:
        job_id = mill.load(place.store, 3)
        mill.session(place.store, only_job="another")
        diagnosis = place.diagnose(job_id)
        expect(diagnosis, Verdict.STUCK, "no_worker")
        assert "serves job another alone" in finding(diagnosis, "bound_worker").message

    def test_dead_and_stopped_workers_are_told_apart(self, place: Place) -> None:
        job_id = mill.load(place.store, 3)
        place.store.registration.enter(mill.session(place.store, name="one").worker_id, WorkerState.STOPPED)
        place.later(100)
        assert "worker one on host (cpu) stopped" in finding(place.diagnose(job_id), "worker_gone").message
        mill.session(place.store, name="two")
        place.later(300)
        gone = finding(place.diagnose(job_id), "worker_gone").message
        assert "worker two on host (cpu) was ready and is dead or unreachable, last seen 5 min 0 s ago" in gone

    @pytest.mark.parametrize(
        ("state", "code", "advice"),
        [(WorkerState.SICK, "all_sick", "check its device"), (WorkerState.FAILED, "all_load_failed", "fix that")],
    )
    def test_workers_that_gave_up_say_why(self, place: Place, state: WorkerState, code: str, advice: str) -> None:
        job_id = mill.load(place.store, 3)
        place.store.registration.enter(mill.session(place.store, name="bad").worker_id, state, error="Xid 79\nfell off")
        reason = expect(place.diagnose(job_id), Verdict.STUCK, code)
        assert reason.message.startswith("no worker of echo (none) is left: worker bad on host (cpu) ")
        assert reason.message.endswith(": Xid 79 fell off")
        assert advice in reason.remedy
        assert reason.remedy.endswith(START)

    def test_a_sick_worker_beside_a_good_one_is_told_and_blocks_nobody(self, place: Place) -> None:
        place.store.registration.enter(
            mill.session(place.store, name="bad").worker_id, WorkerState.SICK, error="Xid 79"
        )
        good = place.store.registration.register(
            host="other", name="good", pid=1, spec=mill.ECHO_SPEC, device="cpu", only_job=None, beat=5.0
        )
        place.store.registration.new_generation(good, child_pid=2)
        diagnosis = place.diagnose(mill.load(place.store, 3))
        expect(diagnosis, Verdict.WAITING, "loading_model")
        assert "worker bad on host (cpu) is sick: Xid 79" in finding(diagnosis, "worker_sick").message

    def test_a_sick_worker_that_was_started_again_is_forgotten(self, place: Place) -> None:
        place.store.registration.enter(mill.session(place.store).worker_id, WorkerState.SICK, error="Xid 79")
        place.store.registration.enter(mill.session(place.store).worker_id, WorkerState.STOPPED)
        expect(place.diagnose(mill.load(place.store, 3)), Verdict.STUCK, "no_worker")

    def test_a_model_that_is_being_loaded_is_waited_for(self, place: Place) -> None:
        job_id = mill.load(place.store, 3)
        who = mill.session(place.store, ready=False)
        place.later(90, who)
        reason = expect(place.diagnose(job_id), Verdict.WAITING, "loading_model")
        assert reason.message.startswith("worker w on host is starting, since ")
        assert reason.message.endswith("(1 min 30 s ago)")
        assert reason.remedy == (
            "wait: a load that takes longer than 1 h 0 min is given up; `batchmill workers` shows its progress"
        )
        demo = ModelSpec("demo")
        mill.session(place.store, ready=False, spec=demo)
        reason = expect(place.diagnose(mill.load(place.store, 3, spec=demo)), Verdict.WAITING, "loading_model")
        assert reason.message.startswith("the model is being loaded by worker w on host, since ")

    def test_a_worker_that_is_silent_and_lives_is_waited_for(self, place: Place) -> None:
        job_id = mill.load(place.store, 3)
        mill.session(place.store, process=Process.own(), host=gethostname())
        place.later(40)
        reason = expect(place.diagnose(job_id), Verdict.WAITING, "worker_silent")
        assert reason.message == "worker w has not been heard of for 40 s, and its process lives"

    def test_the_worker_of_a_mill_that_starts_is_waited_for(self, place: Place, tmp_path: Path) -> None:
        (tmp_path / "mill.pid").write_text(f"{Process.own()}\n")
        settings = Settings(home=tmp_path)
        status = JobStatus.read(place.store, mill.load(place.store, 3), settings)
        diagnosis = diagnose(status, place.store, QueueState(), settings)
        reason = expect(diagnosis, Verdict.WAITING, "worker_starts")
        assert reason.message.endswith(": the mill here is starting its worker")

    def test_a_load_is_counted_and_timed_from_its_own_beginning(self, place: Place) -> None:
        job_id = mill.load(place.store, 3)
        who = mill.session(place.store, ready=False)
        for nth in ("2nd", "3rd", "4th"):
            place.later(90, who)
            place.store.registration.new_generation(who.worker_id, child_pid=3)
            place.later(5, who)
            message = place.diagnose(job_id).findings[0].message
            assert message.startswith(f"worker w on host is starting, for the {nth} time, since ")
            assert message.endswith("(5 s ago)")
        mill.session(place.store, name="later", ready=False)
        message = place.diagnose(job_id).findings[0].message
        assert "w on host" in message
        assert ", the first for the 4th time, since " in message

    def test_a_worker_that_has_no_child_yet_is_timed_from_its_own_start(self, place: Place) -> None:
        job_id = mill.load(place.store, 3)
        place.store.registration.register(
            host="host", name="w", pid=1, spec=mill.ECHO_SPEC, device="cpu", only_job=None, beat=5.0
        )
        place.later(7)
        assert "(7 s ago)" in expect(place.diagnose(job_id), Verdict.WAITING, "loading_model").message

    def test_workers_that_are_ending_take_nothing_new(self, place: Place) -> None:
        job_id = mill.load(place.store, 3)
        place.store.registration.enter(mill.session(place.store).worker_id, WorkerState.DRAINING)
        assert START in expect(place.diagnose(job_id), Verdict.STUCK, "draining").remedy


class TestReadyWorkers:
    def test_idle_workers_find_work_without_redis(self, place: Place) -> None:
        job_id = mill.load(place.store, 3)
        mill.session(place.store)
        reason = expect(place.diagnose(job_id, AWAY), Verdict.WAITING, "redis_away")
        assert "worker w on host checks the store for work every 15 s" in reason.message
        assert reason.remedy == "start Redis, or correct BATCHMILL_BROKER_URL"
        embedded = place.diagnose(job_id, AWAY, external=False)
        assert embedded.findings[0].remedy == "start the mill again: batchmill up -m echo"
        home = Settings().home
        home.mkdir(parents=True, exist_ok=True)
        (home / "mill.pid").write_text(f"{Process.own()}\n")
        embedded = place.diagnose(job_id, AWAY, external=False)
        assert embedded.findings[0].remedy == "wait: the mill that is up starts it again"

    def test_a_worker_whose_process_has_ended_is_started_again_by_the_mill(self, place: Place) -> None:
        job_id = mill.load(place.store, 3)
        live = Process.own()
        assert live is not None
        mill.session(place.store, process=replace(live, start_ticks=live.start_ticks - 1), host=gethostname())
        expect(place.diagnose(job_id), Verdict.STUCK, "no_worker")
        home = Settings().home
        home.mkdir(parents=True, exist_ok=True)
        (home / "mill.pid").write_text(f"{live}\n")
        reason = expect(place.diagnose(job_id), Verdict.WAITING, "worker_restarts")
        assert reason.message == "worker w has ended, and the mill here restarts it within a minute"

    def test_missing_wakeups_follow_with_the_next_pass(self, place: Place) -> None:
        job_id = mill.load(place.store, 10)
        mill.session(place.store)
        reason = expect(place.diagnose(job_id, QueueState(wakeups=1)), Verdict.WAITING, "not_claimed")
        assert "3 batches pending beside idle worker w on host, with 1 wake-up in the queue" in reason.message
        assert "within 15 s" in reason.remedy

    def test_a_full_queue_is_taken_within_seconds(self, place: Place) -> None:
        job_id = mill.load(place.store, 10)
        mill.session(place.store)
        reason = expect(place.diagnose(job_id, QueueState(wakeups=3)), Verdict.WAITING, "not_claimed")
        assert "within seconds" in reason.remedy

    def test_an_idle_worker_that_never_claims_is_to_be_started_again(self, place: Place) -> None:
        job_id = mill.load(place.store, 10)
        who = mill.session(place.store)
        place.later(61, who)
        reason = expect(place.diagnose(job_id, QueueState(wakeups=3)), Verdict.STUCK, "not_claimed")
        assert "with 3 wake-ups in the queue, for 1 min 1 s" in reason.message
        assert "see `batchmill logs w` on host" in reason.remedy

    def test_an_older_job_goes_first(self, place: Place) -> None:
        who = mill.session(place.store)
        older = mill.load(place.store, 20)
        place.later(1, who)
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who)
        diagnosis = place.diagnose(job_id)
        reason = expect(diagnosis, Verdict.WAITING, "older_job_first")
        assert f"job {older} of the same model is older, and its 4 pending batches go first" in reason.message
        assert f"batchmill cancel {older}" in reason.remedy
        busy = finding(diagnosis, "workers_busy").message
        assert "the workers that could take it are busy with other batches: worker w on host" in busy
