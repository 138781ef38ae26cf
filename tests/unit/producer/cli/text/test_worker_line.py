"""The line of a worker for people."""

from __future__ import annotations

from sqlalchemy import update

from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.device_memory import DeviceMemory
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import workers
from batchmill.producer.cli.text.job_lines import job_lines
from batchmill.producer.cli.text.worker_line import loading_line, worker_line
from batchmill.producer.views.public_json import worker_json
from batchmill.producer.views.status import JobStatus
from tests.support.store import mill


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
    store.registration.imported(who.worker_id, who.generation - 1, seconds=99.0)
    assert said(ago=4_000) == "loading torch 1 h 6 min", "an older child says nothing of this one"
    store.registration.imported(who.worker_id, who.generation, seconds=3_600.0)
    assert said(ago=7_500) == "loading torch 1 h 0 min, the model 1 h 5 min"
    mill.session(store, name="ready", spec=spec)
    assert JobStatus.read(store, job_id).loading == ()


def test_a_worker_whose_child_died_holds_nothing_and_is_waited_for(store: Store) -> None:
    job_id = mill.load(store, 3)
    who = mill.session(store)
    store.registration.measured(who.worker_id, who.generation, devices=[DeviceMemory("cpu", "cpu", cache_bytes=5)])
    store.registration.child_died(who.worker_id, who.generation - 1)
    assert store.workers.rows()[0].state is WorkerState.READY, "that was another child"
    store.registration.child_died(who.worker_id, who.generation)
    (row,) = store.workers.rows()
    assert (row.weights_bytes, row.engine, row.devices, row.identity) == (0, None, (), None)
    assert "weights" not in worker_line(row)
    said = "  waiting    worker w is restarting, since its process died"
    assert said in job_lines(JobStatus.read(store, job_id))
    store.registration.new_generation(who.worker_id, child_pid=3)
    assert said not in job_lines(JobStatus.read(store, job_id))
    store.registration.enter(who.worker_id, WorkerState.DRAINING)
    store.registration.child_died(who.worker_id, who.generation + 1)
    assert store.workers.rows()[0].state is WorkerState.DRAINING, "none is started again"


def test_the_line_and_the_json_of_a_worker_name_its_adapters(store: Store) -> None:
    mill.session(store, adapters=[Adapter("sql", "/a"), Adapter("x", "org/x", "v1")])
    (row,) = store.workers.rows()
    assert "cache tokens  adapters: sql=/a, x=org/x@v1  up " in worker_line(row)
    assert worker_json(row)["adapters"]["sql"] == {"path": "/a", "revision": None, "identity": None}


def test_the_line_of_a_worker_says_what_it_is_at_and_why_it_gave_up(store: Store, half_done: str) -> None:
    assert worker_line(store.workers.rows()[0]).startswith(
        "w  ready, 1 batch  echo (none)  cpu on host  100 B weights  echo: 8 rows, 128 context, 1,024 cache tokens  up "
    )
    who = mill.session(store, name="bad")
    store.registration.enter(who.worker_id, WorkerState.SICK, error="x" * 1_000)
    (bad,) = [each for each in store.workers.rows(only_alive=False) if each.name == "bad"]
    assert worker_line(bad).startswith("bad  sick  echo (none)")
    assert worker_line(bad).endswith("xxx...)")


def test_a_worker_that_loads_has_no_limits_yet(store: Store) -> None:
    mill.session(store, ready=False)
    (row,) = store.workers.rows()
    assert "cpu on host  up " in worker_line(row)
    said = worker_json(row)
    assert [said[key] for key in ("engine", "rows", "context_tokens", "cache_tokens")] == [None] * 4
