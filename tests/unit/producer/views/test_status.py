"""The status of a job: the public JSON, pinned key by key and type by type, and the lines for people."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from socket import gethostname
from time import monotonic, sleep
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import select, update

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.device_memory import DeviceMemory
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.generation import GenerationOptions, SamplingParams
from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.runtime.process.pid_file import PidFile
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.runtime.sizes import size
from batchmill.jobs.runtime.times import duration
from batchmill.jobs.store.leases.lease import BatchReport, WorkerSession
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import jobs, runs, workers
from batchmill.producer.cli.jobs import COMMANDS
from batchmill.producer.cli.text.job_lines import job_lines, seconds_line
from batchmill.producer.cli.text.worker_line import loading_line, worker_line
from batchmill.producer.views.estimate import Estimate, estimated
from batchmill.producer.views.gone_workers import seen_here
from batchmill.producer.views.public_json import job_json, status_json, worker_json
from batchmill.producer.views.reasons import missing_lines
from batchmill.producer.views.status import JobStatus
from tests.support.store import mill

NUMBER = (int, float)
#: The public keys of `status JSON`; none may go or change its meaning.
STATUS: dict[str, Any] = {
    "id": str,
    "name": str,
    "state": str,
    "model": str,
    "revision": type(None),
    "quantization": str,
    "counts": {"total": int, "succeeded": int, "failed": int, "cancelled": int, "pending": int},
    "finish_reasons": {"stop": int, "length": int},
    "tokens": {"prompt": int, "completion": int},
    "throughput": {
        "requests_per_second": NUMBER,
        "prompt_tokens_per_second": NUMBER,
        "completion_tokens_per_second": NUMBER,
        "recent_requests_per_second": NUMBER,
    },
    "vram": {
        "weights_bytes": int,
        "peak_allocated_bytes": int,
        "peak_reserved_bytes": int,
        "device_total_bytes": int,
    },
    "devices": list,
    "energy_joules": (*NUMBER, type(None)),
    "seconds": {
        "queued": NUMBER,
        "running": NUMBER,
        "model_load": NUMBER,
        "queued_for_torch": NUMBER,
        "queued_for_model": NUMBER,
    },
    "eta_seconds": (*NUMBER, type(None)),
    "eta_low_seconds": (*NUMBER, type(None)),
    "eta_high_seconds": (*NUMBER, type(None)),
    "looks_sorted": (bool, type(None)),
    "workers": list,
    "unserved_seconds": (*NUMBER, type(None)),
    "identity": str,
    "adapters": dict,
    "missing_adapters": list,
    "given_up": list,
    "options": dict,
    "sampling": dict,
    "kind": str,
    "batch_size": int,
    "runs": int,
    "file": {"name": str, "sha256": str},
    "command": str,
    "versions": dict,
    "model_commits": list,
    "evaluation": (dict, type(None)),
    "queued_at": NUMBER,
    "started_at": NUMBER,
    "finished_at": (*NUMBER, type(None)),
}
WORKER = {
    "name": str,
    "host": str,
    "pid": int,
    "state": str,
    "alive": bool,
    "batches": int,
    "model": str,
    "revision": type(None),
    "quantization": str,
    "device": str,
    "device_name": str,
    "device_uuid": type(None),
    "weights_bytes": int,
    "torch_load_seconds": type(None),
    "model_load_seconds": NUMBER,
    "loading_seconds": type(None),
    "engine": str,
    "rows": int,
    "context_tokens": int,
    "cache_tokens": int,
    "devices": list,
    "identity": str,
    "adapters": dict,
    "uptime_seconds": NUMBER,
    "seen_seconds": NUMBER,
    "error": type(None),
}


def check(value: dict[str, Any], shape: dict[str, Any]) -> None:
    assert list(value) == list(shape)
    for key, kind in shape.items():
        if isinstance(kind, dict):
            check(value[key], kind)
        else:
            assert isinstance(value[key], kind), key


@pytest.fixture
def job_id(store: Store) -> str:
    """A job of ten requests: two succeeded, two failed, one worker at work."""
    flags = GenerationOptions(None, SamplingParams(temperature=0.0))
    job_id = mill.load(store, 10, name="nightly", options=flags)
    who = mill.session(store)
    (claimed,) = mill.claim(store, who)
    mill.save(store, who, [mill.answered(claimed, count=2)])
    errors = [mill.output(job_id, index, error=ErrorCode.ENGINE_ERROR) for index in (2, 3)]
    mill.save(store, who, [BatchReport(claimed.lease, outputs=errors)])
    mill.claim(store, who)
    return job_id


def test_the_json_of_a_running_job_has_the_public_keys(store: Store, job_id: str) -> None:
    status = status_json(JobStatus.read(store, job_id))
    check(status, STATUS)
    check(status["workers"][0], WORKER)
    assert status["counts"] == {"total": 10, "succeeded": 2, "failed": 2, "cancelled": 0, "pending": 6}
    assert status["sampling"] == {"max_tokens": 256, "temperature": 0.0, "top_k": 7}
    assert status["options"] == {"temperature": 0.0}
    assert status["throughput"]["requests_per_second"] > 0
    assert status["eta_seconds"] is None, "so few answers tell nothing"
    assert status["unserved_seconds"] is None
    assert status["given_up"] == []


def test_an_option_with_a_structure_of_its_own_is_shown_as_json_and_cut_short(store: Store) -> None:
    schema = {"type": "object", "description": "x" * 1_000}
    options = GenerationOptions(None, SamplingParams(n=2, response_format={"type": "json_schema", "schema": schema}))
    job_id = mill.load(store, 1, options=options)
    mill.claim(store, mill.session(store))
    (line,) = [each for each in job_lines(JobStatus.read(store, job_id)) if each.startswith("  sampling")]
    assert 'n 2, response_format {"type": "json_schema", "schema": {"type": "object", "d' in line
    assert len(line) < 500


def test_the_json_of_jobs_and_workers(store: Store, job_id: str) -> None:
    job = job_json(store.jobs.job(job_id))
    assert list(job) == [
        "id",
        "name",
        "state",
        "model",
        "revision",
        "quantization",
        "counts",
        "finish_reasons",
        "eta_seconds",
        "eta_low_seconds",
        "eta_high_seconds",
        "looks_sorted",
        "file",
        "queued_at",
        "finished_at",
    ]
    assert sum(count for state, count in job["counts"].items() if state != "total") == job["counts"]["total"]
    check(worker_json(store.workers.rows()[0]), WORKER)


def test_a_worker_that_loads_tells_torch_and_its_model_apart(store: Store) -> None:
    spec = ModelSpec.parse("demo")
    job_id = mill.load(store, 3, spec=spec)
    who = mill.session(store, ready=False, spec=spec)

    def said(*, ago: float) -> str:
        with store.database.write() as connection:
            connection.execute(update(workers).values(loading_since=store.database.now - ago, alive_until=1e12))
        (row,) = store.workers.rows()
        line = loading_line(row)
        assert worker_line(row).endswith(f"  {line}")
        assert f"  waiting    worker w is {line}" in job_lines(JobStatus.read(store, job_id))
        return line

    assert said(ago=4_000) == "loading torch 1 h 6 min"
    store.workers.imported(who.worker_id, who.generation - 1, seconds=99.0)
    assert said(ago=4_000) == "loading torch 1 h 6 min", "an older child says nothing of this one"
    store.workers.imported(who.worker_id, who.generation, seconds=3_600.0)
    assert said(ago=7_500) == "loading torch 1 h 0 min, the model 1 h 5 min"
    mill.session(store, name="ready", spec=spec)
    assert JobStatus.read(store, job_id).loading == ()


def test_a_worker_whose_child_died_holds_nothing_and_is_waited_for(store: Store) -> None:
    job_id = mill.load(store, 3)
    who = mill.session(store)
    store.workers.measured(who.worker_id, who.generation, devices=[DeviceMemory("cpu", "cpu", cache_bytes=5)])
    store.workers.child_died(who.worker_id, who.generation - 1)
    assert store.workers.rows()[0].state is WorkerState.READY, "that was another child"
    store.workers.child_died(who.worker_id, who.generation)
    (row,) = store.workers.rows()
    assert (row.weights_bytes, row.engine, row.devices, row.identity) == (0, None, (), None)
    assert "weights" not in worker_line(row)
    said = "  waiting    worker w is restarting, since its process died"
    assert said in job_lines(JobStatus.read(store, job_id))
    store.workers.new_generation(who.worker_id, child_pid=3)
    assert said not in job_lines(JobStatus.read(store, job_id))
    store.workers.enter(who.worker_id, WorkerState.DRAINING)
    store.workers.child_died(who.worker_id, who.generation + 1)
    assert store.workers.rows()[0].state is WorkerState.DRAINING, "none is started again"


def test_the_waiting_for_torch_and_for_the_model_are_told_where_the_job_waited(store: Store) -> None:
    spec = ModelSpec.parse("demo")
    job_id = mill.load(store, 3, spec=spec)
    who = mill.session(store, spec=spec)
    store.workers.imported(who.worker_id, who.generation, seconds=4.0)
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
    store.workers.child_died(who.worker_id, who.generation)
    store.workers.new_generation(who.worker_id, child_pid=3)
    told = said(began=5, queued=6)
    assert told.startswith("6.0 queued, of which 4.0 importing torch, 0.5 loading the model; "), "another child loads"


class Clocked:
    """A store by a clock that a test sets."""

    @pytest.fixture
    def store(self, clocked: Store) -> Store:
        return clocked


class TestEnd(Clocked):
    """The estimated end of a job, in the same words in every command."""

    @pytest.fixture
    def who(self, store: Store) -> WorkerSession:
        """A worker of eight rows, and a job of 400 requests, which are answered with three tokens each."""
        mill.load(store, 400, batch_size=40, options=GenerationOptions(None, SamplingParams(max_tokens=4)))
        return mill.session(store)

    def work(self, store: Store, who: WorkerSession, clock: mill.Clock, *, batches: int) -> None:
        """Answers four requests a second; of another batch the first half, so that it is held on."""
        for place in range(batches + 1):
            (claimed,) = mill.claim(store, who)
            clock.seconds += 10 if place < batches else 5
            store.workers.heartbeat(who.worker_id, beat=5.0)
            mill.save(store, who, [mill.answered(claimed, count=None if place < batches else 20)])

    def read(self, store: Store) -> JobStatus:
        return JobStatus.read(store, store.jobs.find("last"))

    def test_it_is_measured_then_known_and_nothing_once_no_worker_lives(
        self, store: Store, who: WorkerSession, clock: mill.Clock
    ) -> None:
        assert self.read(store).ends_in == ""
        (claimed,) = mill.claim(store, who)
        assert self.read(store).ends_in == "measuring"
        assert "  ends in    measuring" in job_lines(self.read(store))
        mill.save(store, who, [replace(mill.answered(claimed, count=0), release=True)])
        self.work(store, who, clock, batches=4)
        status = self.read(store)
        assert status.estimate is not None
        assert status.estimate.seconds == pytest.approx(220 / 4, rel=0.1)
        said = status_json(status)
        assert said["eta_low_seconds"] <= said["eta_seconds"] <= said["eta_high_seconds"]
        assert f"  ends in    {status.ends_in}" in job_lines(status)
        clock.seconds += 3_600
        gone = self.read(store)
        assert (gone.estimate, gone.ends_in, status_json(gone)["eta_seconds"]) == (None, "", None)
        assert gone.rate == pytest.approx(180 / 50), "and the hour in which nobody lived is no work"

    def test_status_wait_and_jobs_say_the_same(
        self, store: Store, who: WorkerSession, clock: mill.Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.work(store, who, clock, batches=4)
        monkeypatch.setattr("batchmill.producer.cli.jobs._open", lambda: (load_settings(), store))
        run = CliRunner().invoke
        listed, status = run(COMMANDS[1], []), run(COMMANDS[0], [])
        waited = run(COMMANDS[3], ["--timeout", "0"])
        ends = self.read(store).ends_in
        assert ends.startswith("about ")
        assert f"  ends in    {ends}" in status.stdout.splitlines()
        assert listed.stdout.rstrip().endswith(f"  ends in {ends}")
        assert f"ends in {ends}" in waited.stderr
        in_json = json.loads(run(COMMANDS[1], ["--json"]).stdout)[0]
        assert in_json["eta_seconds"] == json.loads(run(COMMANDS[0], ["--json"]).stdout)["eta_seconds"]

    def test_a_job_that_is_cancelled_or_over_says_nothing(
        self, store: Store, who: WorkerSession, clock: mill.Clock
    ) -> None:
        self.work(store, who, clock, batches=4)
        store.closing.cancel(store.jobs.find("last"))
        assert self.read(store).ends_in == ""


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Estimate(40.0, 30.0, 70.0, False), "about 40 s (30 s to 1 min 10 s)"),
        (Estimate(40.2, 40.1, 40.3, False), "about 40 s"),
        (Estimate(5.0, 1.0, 60.0, False), "1 s to 1 min 0 s"),
        (
            Estimate(40.0, 30.0, 70.0, True),
            "about 40 s (30 s to 1 min 10 s); the file looks sorted by length, which makes this unreliable",
        ),
    ],
)
def test_estimates_for_people(found: Estimate, said: str) -> None:
    assert estimated(found) == said


def test_a_job_that_nobody_serves_says_who_is_missing(store: Store) -> None:
    status = JobStatus.read(store, mill.load(store, 3))
    assert status.missing_seconds is not None
    text = "\n".join(job_lines(status))
    assert "  waiting    no worker serves echo (none) yet; start one:\n" in text
    assert "batchmill up -m echo" in text


def test_a_job_whose_last_worker_has_ended_says_since_when(store: Store) -> None:
    job_id = mill.load(store, 3)
    store.workers.enter(mill.session(store).worker_id, WorkerState.STOPPED)
    first, _ = missing_lines(JobStatus.read(store, job_id))
    assert re.fullmatch(r"no live worker has served echo \(none\) for \d+ s; start one:", first)


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


def test_the_line_and_the_json_of_a_worker_name_its_adapters(store: Store) -> None:
    mill.session(store, adapters=[Adapter("sql", "/a"), Adapter("x", "org/x", "v1")])
    (row,) = store.workers.rows()
    assert "cache tokens  adapters: sql=/a, x=org/x@v1  up " in worker_line(row)
    assert worker_json(row)["adapters"]["sql"] == {"path": "/a", "revision": None, "identity": None}


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
    store.workers.enter(mill.session(store).worker_id, state, error="Xid 79\nfell off the bus")
    status = JobStatus.read(store, job_id)
    assert status.missing_seconds is not None
    text = "\n".join(job_lines(status))
    assert re.search(r"no live worker has served echo \(none\) for \d+ s:", text)
    assert said in text
    assert advice in text
    assert "then start it again: batchmill up -m echo" in text
    check(
        status_json(status)["given_up"][0],
        {"name": str, "host": str, "device": str, "state": str, "error": str},
    )


def test_a_sick_worker_beside_a_good_one_keeps_nobody_waiting(store: Store) -> None:
    job_id = mill.load(store, 3)
    store.workers.enter(mill.session(store).worker_id, WorkerState.SICK, error="Xid 79")
    mill.session(store)
    status = JobStatus.read(store, job_id)
    assert (status.missing_seconds, missing_lines(status)) == (None, [])
    assert "Xid 79" not in "\n".join(job_lines(status))


def test_the_line_of_a_worker_says_what_it_is_at_and_why_it_gave_up(store: Store, job_id: str) -> None:
    assert worker_line(store.workers.rows()[0]).startswith(
        "w  ready, 1 batch  echo (none)  cpu on host  100 B weights  echo: 8 rows, 128 context, 1,024 cache tokens  up "
    )
    who = mill.session(store, name="bad")
    store.workers.enter(who.worker_id, WorkerState.SICK, error="x" * 1_000)
    (bad,) = [each for each in store.workers.rows(only_alive=False) if each.name == "bad"]
    assert worker_line(bad).startswith("bad  sick  echo (none)")
    assert worker_line(bad).endswith("xxx...)")


def test_a_worker_of_this_machine_whose_process_has_ended_is_dead_at_once(store: Store) -> None:
    live = Process.own()
    assert live is not None
    ended = replace(live, start_ticks=live.start_ticks - 1)
    job_id = mill.load(store, 3)
    for name, process in (("lives", live), ("contained", replace(ended, namespace=1)), ("ended", ended)):
        mill.session(store, name=name, process=process, host=gethostname())
    rows = {each.name: seen_here(each) for each in store.workers.rows()}
    assert {name: each.alive for name, each in rows.items()} == {"ended": False, "lives": True, "contained": True}
    assert worker_line(rows["ended"]).startswith("ended  dead  ")
    assert worker_line(replace(rows["lives"], alive=False)).startswith("lives  silent  ")
    assert worker_line(replace(rows["contained"], alive=False)).startswith("contained  dead  ")
    assert JobStatus.read(store, job_id).missing_seconds is None
    store.workers.enter(rows["lives"].id, WorkerState.STOPPED)
    store.workers.enter(rows["contained"].id, WorkerState.STOPPED)
    assert JobStatus.read(store, job_id).missing_seconds is not None
    assert JobStatus.read(store, job_id).restarting is None
    home = load_settings().home
    home.mkdir(parents=True, exist_ok=True)
    (home / "mill.pid").write_text(f"{live}\n")
    lines = job_lines(JobStatus.read(store, job_id))
    assert "  waiting    worker ended has ended, and the mill here restarts it within a minute;" in lines
    assert "  waiting    if neither `up` nor `run` started it, start it yourself: batchmill worker -m echo" in lines


class TestUptime(Clocked):
    """A worker's time up ends where it stopped, was last seen, or is found gone."""

    def up(self, store: Store, who: WorkerSession) -> float:
        (row,) = [each for each in store.workers.rows(only_alive=False) if each.id == who.worker_id]
        return seen_here(row).uptime_seconds

    def test_of_a_worker_that_stopped_between_two_heartbeats(self, store: Store, clock: mill.Clock) -> None:
        who = mill.session(store)
        clock.seconds += 7
        assert self.up(store, who) == 7
        store.workers.enter(who.worker_id, WorkerState.STOPPED)
        clock.seconds += 1_000
        assert self.up(store, who) == 7

    def test_of_a_worker_that_is_heard_of_no_more(self, store: Store, clock: mill.Clock) -> None:
        who = mill.session(store)
        clock.seconds += 5
        store.workers.heartbeat(who.worker_id, beat=5.0)
        clock.seconds += 1_000
        assert self.up(store, who) == 5

    def test_of_a_worker_whose_process_is_gone(self, store: Store, clock: mill.Clock) -> None:
        live = Process.own()
        assert live is not None
        who = mill.session(store, process=replace(live, start_ticks=live.start_ticks - 1))
        clock.seconds += 5
        store.workers.heartbeat(who.worker_id, beat=5.0)
        clock.seconds += 3
        assert self.up(store, who) == 5


def test_a_worker_that_loads_has_no_limits_yet(store: Store) -> None:
    mill.session(store, ready=False)
    (row,) = store.workers.rows()
    assert "cpu on host  up " in worker_line(row)
    said = worker_json(row)
    assert [said[key] for key in ("engine", "rows", "context_tokens", "cache_tokens")] == [None] * 4


def test_a_worker_bound_to_another_job_serves_nobody_else(store: Store) -> None:
    job_id = mill.load(store, 3)
    mill.session(store, only_job="another")
    assert JobStatus.read(store, job_id).missing_seconds is not None


def test_the_lines_for_people_name_what_counts(store: Store, job_id: str) -> None:
    text = "\n".join(job_lines(JobStatus.read(store, job_id)))
    assert f"job {job_id} (nightly): running" in text
    assert "10 = 2 succeeded + 2 failed + 0 cancelled + 6 pending" in text
    assert "temperature 0.0" in text
    assert "at work    w on host, cpu" in text


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (60, "1 min 0 s"),
        (3_599, "59 min 59 s"),
        (7_500, "2 h 5 min"),
        (2 * 86_400 - 1, "47 h 59 min"),
        (2 * 86_400, "2 d 0 h"),
        (273_700, "3 d 4 h"),
    ],
)
def test_durations_for_people(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(("count", "said"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (80 * 2**30, "80.0 GiB")])
def test_sizes_for_people(count: int, said: str) -> None:
    assert size(count) == said


def test_a_worker_that_is_silent_while_its_process_lives_has_not_ended(store: Store) -> None:
    home = load_settings().home
    home.mkdir(parents=True, exist_ok=True)
    (home / "mill.pid").write_text(f"{Process.own()}\n")
    job_id = mill.load(store, 3)
    mill.session(store, process=Process.own(), host=gethostname())

    def said_after(seconds: float) -> str:
        earlier = {"heartbeat_at": workers.c.heartbeat_at - seconds, "alive_until": workers.c.alive_until - seconds}
        with store.database.write() as connection:
            connection.execute(update(workers).values(earlier))
        return " ".join(missing_lines(JobStatus.read(store, job_id)))

    silent = r"worker w has not been heard of for \d+ s, and its process lives"
    assert re.fullmatch(silent, said_after(30))
    assert not re.fullmatch(silent, said_after(3_600))


class TestAMillThatStarts:
    """A job beside an `up` or `run` whose worker is not in the store yet."""

    @pytest.fixture
    def home(self) -> Path:
        home = load_settings().home
        home.mkdir(parents=True, exist_ok=True)
        (home / "mill.pid").write_text(f"{Process.own()}\n")
        return home

    @pytest.fixture
    def serve(self, home: Path) -> Iterator[Callable[..., None]]:
        """Starts a process that has the command line of a mill's workers."""
        started: list[subprocess.Popen[bytes]] = []

        def serve(*words: str) -> None:
            started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words]))
            PidFile(home / "worker.pid").write(started[-1].pid)
            until = monotonic() + 30
            while not PidFile(home / "worker.pid").command_line[3:] and monotonic() < until:
                sleep(0.01)

        yield serve
        for each in started:
            each.kill()
            each.wait()

    def said(self, store: Store, job_id: str) -> str:
        return " ".join(missing_lines(JobStatus.read(store, job_id)))

    def test_starts_a_worker_that_nobody_else_has_to(self, store: Store, home: Path) -> None:
        (home / "worker.pid").write_text(f"{Process.own()}\n".replace("1.", "1.9", 1))
        said = self.said(store, mill.load(store, 3))
        assert said == "no worker serves echo (none) yet: the mill here is starting its worker"
        (home / "mill.pid").unlink()
        assert "; start one: batchmill" in self.said(store, mill.load(store, 3))

    def test_starts_that_of_its_own_model_alone(self, store: Store, serve: Callable[..., None]) -> None:
        job_id, other = mill.load(store, 3), mill.load(store, 3, spec=ModelSpec("demo"))
        serve("-m", "echo", "--devices", "cpu")
        assert self.said(store, job_id).endswith(": the mill here is starting its worker")
        assert "; start one: batchmill worker -m demo" in self.said(store, other)
        mill.session(store)
        assert self.said(store, job_id) == ""

    def test_starts_that_of_a_run_for_its_job_alone(self, store: Store, serve: Callable[..., None]) -> None:
        job_id, other = mill.load(store, 3), mill.load(store, 3)
        serve("-m", "echo", "--job", job_id, "--devices", "cpu")
        assert self.said(store, job_id).endswith(": the mill here is starting its worker")
        assert "; start one: batchmill worker" in self.said(store, other)

    def test_says_that_its_worker_is_sick(self, store: Store, serve: Callable[..., None]) -> None:
        job_id = mill.load(store, 3)
        store.workers.enter(mill.session(store).worker_id, WorkerState.SICK, error="Xid 79")
        serve("-m", "echo", "--devices", "cpu")
        assert "is sick: Xid 79" in self.said(store, job_id)


def test_early_lines_leave_out_what_nothing_is_known_of(store: Store) -> None:
    job_id = mill.load(store, 8)
    mill.claim(store, mill.session(store), wanted=4, room=8)
    text = "\n".join(job_lines(JobStatus.read(store, job_id)))
    assert "  seconds  " in text
    assert "  memory  " not in text
    assert "  speed  " not in text
