"""Reasons why a job does not move: every finding, its verdict and its advice, on both databases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from socket import gethostname

import pytest
from click.testing import CliRunner
from sqlalchemy import update

from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.errors import NotFound
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.requests.states import RunOutcome, WorkerState
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.leases.lease import BatchReport, WorkerSession
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import batches
from batchmill.producer.cli.main import cli
from batchmill.producer.views.diagnosis.findings import Finding
from batchmill.producer.views.diagnosis.snapshot import QueueState
from batchmill.producer.views.diagnosis.verdict import Diagnosis, Verdict, diagnose
from batchmill.producer.views.status import JobStatus
from tests.support.store import mill

LLAMA = ModelSpec("org/llama", None, Quantization(Kind.NF4))
AWAY = QueueState(error="Redis at redis://mill/0 is not reachable: Connection refused")
START = "batchmill worker -m echo"


@dataclass
class Place:
    """A store whose clock the test sets."""

    store: Store
    clock: mill.Clock

    def diagnose(self, job_id: str, queue: QueueState | None = None, *, external: bool = True) -> Diagnosis:
        settings = Settings(broker_url="redis://mill/0") if external else Settings()
        return diagnose(JobStatus.read(self.store, job_id, settings), self.store, queue or QueueState(), settings)

    def later(self, seconds: float, *beating: WorkerSession) -> None:
        """Time passes; these workers live on."""
        self.clock.seconds += seconds
        for each in beating:
            self.store.workers.heartbeat(each.worker_id, beat=5.0)


@pytest.fixture
def place(clocked: Store, clock: mill.Clock) -> Place:
    return Place(clocked, clock)


def finding(diagnosis: Diagnosis, code: str) -> Finding:
    found = [each for each in diagnosis.findings if each.code == code]
    assert found, [each.code for each in diagnosis.findings]
    return found[0]


def expect(diagnosis: Diagnosis, verdict: Verdict, reason: str) -> Finding:
    assert (diagnosis.verdict, diagnosis.findings[0].code) == (verdict, reason)
    assert diagnosis.exit_code == (verdict is Verdict.STUCK)
    return diagnosis.findings[0]


class TestClosedAndMoving:
    def test_a_job_that_succeeded_needs_nothing(self, place: Place) -> None:
        job_id = mill.load(place.store, 3)
        mill.work_off(place.store, mill.session(place.store))
        reason = expect(place.diagnose(job_id), Verdict.CLOSED, "closed")
        assert reason.remedy == f"`batchmill results {job_id}` writes its outputs"
        assert reason.message.endswith("0 failed, 0 cancelled; finished: 3 stop")

    def test_a_job_that_failed_names_results_and_retry(self, place: Place) -> None:
        job_id = mill.load(place.store, 3)
        mill.work_off(place.store, mill.session(place.store), error=ErrorCode.ENGINE_ERROR)
        reason = expect(place.diagnose(job_id), Verdict.CLOSED, "closed")
        assert "3 failed" in reason.message
        assert reason.remedy.endswith(f"; `batchmill retry {job_id}` runs those that may succeed now")

    def test_a_retry_that_would_move_nothing_is_not_advised(self, place: Place) -> None:
        job_id = mill.load(place.store, 3)
        mill.work_off(place.store, mill.session(place.store), error=ErrorCode.EMPTY_PROMPT)
        assert expect(place.diagnose(job_id), Verdict.CLOSED, "closed").remedy == (
            f"`batchmill results {job_id} --only failed` shows what did not succeed; a retry would skip them"
            f" (3 empty_prompt: its line alone decides that); `batchmill retry {job_id} --all` runs these too;"
            " submit corrected lines as a new file"
        )

    def test_answers_in_the_last_minute_are_moving_with_an_end(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 20)
        place.later(10, who)
        for _ in range(3):
            (claimed,) = mill.claim(place.store, who)
            place.later(10, who)
            mill.save(place.store, who, [mill.answered(claimed)])
        mill.claim(place.store, who)
        place.later(2, who)
        diagnosis = place.diagnose(job_id, AWAY)
        assert "the last answer came 2 s ago; it ends in " in expect(diagnosis, Verdict.MOVING, "moving").message
        assert (
            "12 of 20 requests ended; 1 batch pending (the next one for 42 s), 1 held"
            in finding(diagnosis, "progress").message
        )
        assert "worker w on host (cpu) holds 1 batch since" in finding(diagnosis, "held").message
        assert "busy workers go on" in finding(diagnosis, "redis_away").message

    def test_a_held_batch_without_answers_yet_is_in_somebodys_hands(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who)
        place.later(15, who)
        assert "no answer yet" in expect(place.diagnose(job_id), Verdict.MOVING, "at_work").message

    def test_a_long_silence_under_a_renewed_lease_says_who_ends_it(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 4)
        (claimed,) = mill.claim(place.store, who)
        mill.save(place.store, who, [mill.answered(claimed, count=1)])
        for _ in range(3):
            place.later(50, who)
            mill.save(place.store, who, [BatchReport(claimed.lease)])
        reason = expect(place.diagnose(job_id), Verdict.MOVING, "at_work")
        assert "no answer for 2 min 30 s" in reason.message
        assert "600 s" in reason.remedy


class TestNames:
    def test_a_name_like_that_of_a_known_model_is_asked_about(self, place: Place) -> None:
        job_id = mill.load(place.store, 3, spec=ModelSpec("dmeo"))
        reason = expect(place.diagnose(job_id), Verdict.STUCK, "likely_slip")
        assert reason.message == "'dmeo' is no folder here, no cached model and no org/name: did you mean demo?"
        assert reason.remedy == (
            f"`batchmill cancel {job_id}`, and submit it again with -m demo; if dmeo is what you mean, start a worker:"
            " batchmill worker -m dmeo -q nf4"
        )


class TestAdapters:
    def test_the_adapter_that_nobody_holds_is_named_with_the_command(self, place: Place) -> None:
        job_id = mill.load_named(place.store, "sql", "sql", "x", batch_size=1)
        mill.session(place.store, adapters=[Adapter("x", "/x")])
        mill.claim(place.store, mill.session(place.store, name="other", adapters=[Adapter("x", "/x")]))
        place.store.workers.enter(2, WorkerState.STOPPED)
        place.store.recovery.take_back(2, generation=1, outcome=RunOutcome.RELEASED)
        found = finding(place.diagnose(job_id), "adapter_missing")
        assert found.message == "2 batches wait for the adapter sql, which no live worker holds"
        assert found.remedy == f"start a worker that holds it: {START} --adapter sql=PATH_OR_ID"
        assert not found.stuck  # a worker is there for the third batch
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
        found = expect(place.diagnose(job_id), Verdict.STUCK, "adapter_missing")
        assert found.message.endswith(": this job means org/sql@v1, and worker newer on host holds /b under that name")
        assert found.remedy.endswith("--adapter sql=org/sql@v1")

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
        place.store.workers.enter(mill.session(place.store, name="one").worker_id, WorkerState.STOPPED)
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
        place.store.workers.enter(mill.session(place.store, name="bad").worker_id, state, error="Xid 79\nfell off")
        reason = expect(place.diagnose(job_id), Verdict.STUCK, code)
        assert reason.message.startswith("no worker of echo (none) is left: worker bad on host (cpu) ")
        assert reason.message.endswith(": Xid 79 fell off")
        assert advice in reason.remedy
        assert reason.remedy.endswith(START)

    def test_a_sick_worker_beside_a_good_one_is_told_and_blocks_nobody(self, place: Place) -> None:
        place.store.workers.enter(mill.session(place.store, name="bad").worker_id, WorkerState.SICK, error="Xid 79")
        good = place.store.workers.register(
            host="other", name="good", pid=1, spec=mill.ECHO_SPEC, device="cpu", only_job=None, beat=5.0
        )
        place.store.workers.new_generation(good, child_pid=2)
        diagnosis = place.diagnose(mill.load(place.store, 3))
        expect(diagnosis, Verdict.WAITING, "loading_model")
        assert "worker bad on host (cpu) is sick: Xid 79" in finding(diagnosis, "worker_sick").message

    def test_a_sick_worker_that_was_started_again_is_forgotten(self, place: Place) -> None:
        place.store.workers.enter(mill.session(place.store).worker_id, WorkerState.SICK, error="Xid 79")
        place.store.workers.enter(mill.session(place.store).worker_id, WorkerState.STOPPED)
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
            place.store.workers.new_generation(who.worker_id, child_pid=3)
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
        place.store.workers.register(
            host="host", name="w", pid=1, spec=mill.ECHO_SPEC, device="cpu", only_job=None, beat=5.0
        )
        place.later(7)
        assert "(7 s ago)" in expect(place.diagnose(job_id), Verdict.WAITING, "loading_model").message

    def test_workers_that_are_ending_take_nothing_new(self, place: Place) -> None:
        job_id = mill.load(place.store, 3)
        place.store.workers.enter(mill.session(place.store).worker_id, WorkerState.DRAINING)
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


class TestLeases:
    def test_a_dead_holder_loses_its_lease_at_a_known_time(self, place: Place) -> None:
        dead = mill.session(place.store, name="dead")
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, dead)
        place.later(30)
        mill.session(place.store, name="other", spec=LLAMA)
        reason = expect(place.diagnose(job_id), Verdict.WAITING, "dead_holder")
        assert "worker dead on host (cpu) holds 1 batch since 1970-01-12 13:46:40 UTC (30 s)" in reason.message
        assert "last seen 30 s ago; the lease runs until 1970-01-12 13:47:40 UTC, for another 30 s" in reason.message
        assert "a live worker requeues them within 1 min 0 s of the lease's end" in reason.remedy

    def test_a_lease_without_anybody_alive_is_never_taken_back(self, place: Place) -> None:
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, mill.session(place.store))
        place.later(100)
        reason = expect(place.diagnose(job_id), Verdict.STUCK, "nobody_reconciles")
        assert "the lease expired at 1970-01-12 13:47:40 UTC, 40 s ago" in reason.message
        assert reason.remedy.endswith(f"start one: {START}")

    def test_a_killed_worker_of_this_machine_is_known_to_be_gone_at_once(self, place: Place) -> None:
        live = Process.own()
        assert live is not None
        killed = replace(live, start_ticks=live.start_ticks - 1)
        who = mill.session(place.store, process=killed)
        job_id = mill.load(place.store, 4)
        assert START in expect(place.diagnose(job_id), Verdict.STUCK, "no_worker").remedy
        mill.claim(place.store, who)
        place.later(3)
        reason = expect(place.diagnose(job_id), Verdict.STUCK, "nobody_reconciles")
        assert "has ended or is unreachable, last seen 3 s ago" in reason.message
        mill.session(place.store, name="other", spec=LLAMA)
        expect(place.diagnose(job_id), Verdict.WAITING, "dead_holder")

    def test_a_frozen_process_loses_its_lease_while_its_worker_lives(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who)
        place.later(70, who)
        reason = expect(place.diagnose(job_id), Verdict.WAITING, "lease_expired")
        assert "is alive but does not renew it" in reason.message

    def test_a_lease_that_live_workers_leave_alone_is_a_reason_to_act(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who)
        place.later(200, who)
        assert (
            "`batchmill logs --level warning`" in expect(place.diagnose(job_id), Verdict.STUCK, "lease_expired").remedy
        )

    def test_a_lease_of_a_clock_that_was_set_back_is_no_work_in_progress(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who)
        place.later(-3_600, who)
        reason = expect(place.diagnose(job_id), Verdict.WAITING, "lease_expired")
        assert "which no lease does: the store's clock was set back" in reason.message
        assert "a live worker requeues them" in reason.remedy

    def test_suspects_and_crashes_are_named(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who)
        place.store.recovery.take_back(who.worker_id, generation=1)
        diagnosis = place.diagnose(job_id)
        assert "4 requests in 1 batch were in a worker when its process died" in finding(diagnosis, "suspects").message
        crashed = finding(diagnosis, "crashed")
        assert "a process of w on host died on this job, 1 time, the last at" in crashed.message
        assert crashed.remedy == "`batchmill logs w` on host shows why"

    def test_a_worker_that_ended_itself_is_told_by_the_log_of_its_supervisor(self, place: Place) -> None:
        live = Process.own()
        assert live is not None
        who = mill.session(place.store, name="gpu 1", process=replace(live, start_ticks=live.start_ticks - 1))
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who)
        place.later(3)
        place.store.recovery.take_back(who.worker_id, generation=1)
        assert finding(place.diagnose(job_id), "crashed").remedy == (
            "the worker itself ended: `batchmill logs 'gpu 1'` on host has its last lines, and `batchmill logs"
            " supervisor` there shows how it ended, if `up`, `run` or `--devices` started it and outlived it"
        )

    @pytest.mark.parametrize("then", ["lives on", "stops"])
    def test_a_worker_that_outlived_its_process_says_itself_how_that_ended(self, place: Place, then: str) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who)
        place.later(3)
        place.store.recovery.take_back(who.worker_id, generation=1)
        if then == "stops":
            place.store.workers.enter(who.worker_id, WorkerState.STOPPED)
        else:
            place.later(1, who)
        place.later(600)
        assert finding(place.diagnose(job_id), "crashed").remedy == "`batchmill logs w` on host shows why"

    def test_a_lease_that_ran_out_is_no_death(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who)
        place.later(100, who)
        place.store.recovery.reap(place.store.recovery.expired(lease_seconds=mill.LEASE_SECONDS))
        crashed = finding(place.diagnose(job_id), "crashed")
        assert "let its lease expire" in crashed.message
        assert crashed.remedy == "`batchmill logs w` on host has its log of that time"


class TestEnding:
    def test_a_cancel_waits_for_who_holds_the_rest(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 8)
        mill.claim(place.store, who)
        place.store.closing.cancel(job_id)
        reason = expect(place.diagnose(job_id), Verdict.WAITING, "cancelling")
        assert "waits for worker w on host to release 1 batch" in reason.message

    def test_a_cancel_of_what_the_dead_hold_is_ended_by_status(self, place: Place) -> None:
        job_id = mill.load(place.store, 8)
        mill.claim(place.store, mill.session(place.store))
        place.store.closing.cancel(job_id)
        place.later(30)
        diagnosis = place.diagnose(job_id)
        reason = expect(diagnosis, Verdict.STUCK, "nobody_reconciles")
        assert f"`batchmill status {job_id}` requeues them from 1970-01-12 13:48:40 UTC on" in reason.remedy
        assert "worker w on host left 1 batch behind" in finding(diagnosis, "cancelling").message

    def test_a_job_with_nothing_open_is_closed_by_the_next_pass(self, place: Place) -> None:
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who := mill.session(place.store))
        with place.store.database.write() as connection:
            leased = {"worker_id": None, "worker_generation": None, "lease_until": None}
            connection.execute(update(batches).values(state="done", **leased))
        assert "within 15 s" in expect(place.diagnose(job_id), Verdict.WAITING, "closing").remedy
        place.store.workers.enter(who.worker_id, WorkerState.STOPPED)
        assert f"batchmill status {job_id}" in expect(place.diagnose(job_id), Verdict.STUCK, "closing").remedy

    def test_a_job_that_is_loading_is_no_job_yet(self, place: Place) -> None:
        job_id = mill.begin(place.store)
        with pytest.raises(NotFound):
            place.store.blockers.around(job_id, lease_seconds=60.0)


class TestWords:
    def test_the_json_has_its_keys_and_no_prompt(self, place: Place) -> None:
        job_id = mill.load(place.store, 3, name="nightly")
        said = place.diagnose(job_id, AWAY).to_json()
        assert list(said) == ["job", "state", "verdict", "findings"]
        assert (said["job"], said["state"], said["verdict"]) == (job_id, "queued", "stuck")
        assert all(list(each) == ["code", "message", "remedy"] for each in said["findings"])
        assert "prompt " not in str(said)

    def test_the_lines_begin_with_the_verdict_and_what_to_do(self, place: Place) -> None:
        job_id = mill.load(place.store, 3, name="nightly")
        place.later(4)
        assert place.diagnose(job_id).lines() == [
            f"job {job_id} (nightly) is stuck: no live worker serves echo (none), for 4 s",
            f"  -> start one: {START}",
            "  0 of 3 requests ended; 1 batch pending (the next one for 4 s), 0 held",
        ]

    def test_many_workers_are_counted_rather_than_named(self, place: Place) -> None:
        for number in range(5):
            mill.session(place.store, name=f"w{number}", ready=False)
        message = place.diagnose(mill.load(place.store, 3)).findings[0].message
        assert "and 2 more" in message


class TestCommand:
    def test_a_model_goes_without_a_job(self) -> None:
        done = CliRunner().invoke(cli, ["doctor", "last", "-m", "echo"])
        assert done.exit_code == 2
        assert "leave --model out" in done.output

    def test_no_such_job_is_exit_3(self) -> None:
        assert CliRunner().invoke(cli, ["doctor", "nosuchjob"]).exit_code == 3
