"""The store's revisions: the tables that the code describes are the tables that the migrations make."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, select, text
from sqlalchemy.exc import OperationalError

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.errors import SchemaMismatch, StoreFull, StoreUnavailable
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.requests.states import JobState, RequestState
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import REVISION, metadata, runs
from batchmill.jobs.store.views.jobs import FinishReasons
from batchmill.migrations import revisions
from tests.support.processes.wheel import build_wheel, copy_sources
from tests.support.store import mill, old_store
from tests.support.store.oracle import violations

OLD_JOB = """INSERT INTO jobs
    (id, state, spec, batch_size, options, file_name, command, versions, created_at, queued_at)
    VALUES ('old', 'completed', 'echo', 4, '{}', 'p.jsonl', '', '{}', 1, 1)"""
OLD_BATCH = "INSERT INTO batches (id, job_id, state, total, succeeded) VALUES (1, 'old', 'done', 1, 1)"
OLD_REQUEST = "INSERT INTO requests (job_id, \"index\", custom_id, batch_id, body) VALUES ('old', 0, 'a', 1, '{}')"
OLD_OUTPUT = """INSERT INTO outputs
    (job_id, "index", state, choices, prompt_tokens, completion_tokens, finished_at)
    VALUES ('old', 0, 'succeeded', '[{"text":"a","finish_reason":"stop"}]', 1, 1, 1)"""


def test_the_code_works_at_the_newest_revision() -> None:
    script = ScriptDirectory.from_config(revisions.alembic_config("sqlite://"))
    assert script.get_current_head() == REVISION


def test_alembic_finds_nothing_to_change(store_url: str) -> None:
    command.check(revisions.alembic_config(store_url))


def test_partial_indexes_are_of_the_rows_that_the_tables_say(store_url: str) -> None:
    def bare(where: object) -> str:
        return "".join(each for each in str(where).replace("::text", "") if each not in "() ")

    engine = create_engine(store_url)
    for table in metadata.tables.values():
        found = {str(each["name"]): each["dialect_options"] for each in inspect(engine).get_indexes(table.name)}
        for index in table.indexes:
            stored = found[str(index.name)].get(f"{engine.dialect.name}_where", "")
            assert bare(stored) == bare(index.info.get("where", "")), index.name
    engine.dispose()
    assert sum("where" in index.info for table in metadata.tables.values() for index in table.indexes) == 4


def test_upgrading_twice_changes_nothing(sqlite_url: str) -> None:
    store = Store(sqlite_url)
    job_id = mill.load(store, 3)
    revisions.upgrade(sqlite_url)
    assert store.jobs.job(job_id).counts.total == 3
    store.close()


def test_an_upgrade_of_sqlite_that_breaks_off_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    command.upgrade(revisions.alembic_config(url), "0003")
    with sqlite3.connect(tmp_path / "store.db") as connection:
        connection.execute("CREATE TABLE evaluations (id INTEGER)")  # in the way of 0004's last step
    with pytest.raises(OperationalError, match="already exists"):
        command.upgrade(revisions.alembic_config(url), "head")
    with sqlite3.connect(tmp_path / "store.db") as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0003",)]
        assert "devices" not in {row[1] for row in connection.execute("PRAGMA table_info(runs)")}


def test_the_embedded_store_is_made_at_first_use() -> None:
    settings = load_settings()
    store = revisions.open_store(settings)
    assert store.revision() == REVISION
    assert settings.database_file.exists()
    store.close()


def test_an_older_embedded_store_is_upgraded_after_a_copy_was_kept() -> None:
    settings = load_settings()
    revisions.open_store(settings).close()
    set_revision(settings.database, "0000")
    with pytest.raises(Exception, match="0000"):  # there is no such migration, so alembic refuses
        revisions.open_store(settings)
    assert [path.name.split(".")[1] for path in settings.home.glob("batchmill.0000.*.db")] == ["0000"]


def test_a_newer_embedded_store_is_left_alone() -> None:
    settings = load_settings()
    revisions.open_store(settings).close()
    set_revision(settings.database, "9999")
    with pytest.raises(SchemaMismatch, match="newer batchmill"):
        revisions.open_store(settings)


def test_a_store_of_before_timings_keeps_its_outputs(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/old.db"
    revisions.upgrade(url, revision="0002")
    store = Store(url)
    with store.database.write() as connection:
        connection.execute(text(OLD_JOB))
        connection.execute(text(OLD_BATCH))
        connection.execute(text(OLD_REQUEST))
        connection.execute(text(OLD_OUTPUT))
    revisions.upgrade(url)
    ((row,),) = store.jobs.output_pages("old", states=frozenset(RequestState), page=10)
    assert (row.payload, row.queued_seconds) == ('[{"text":"a","finish_reason":"stop"}]', None)
    store.close()


@pytest.mark.parametrize("revision", ["0004", "0005", "0006", "0007", "0010", "0011"])
class TestBeforeIdentities:
    """A store of before the identities of models, of processes and stores, finish reasons, runs' loading, or kinds."""

    @pytest.fixture
    def store(self, old_url: str, revision: str) -> Iterator[Store]:
        old_store.build(old_url, revision=revision)
        revisions.upgrade(old_url)
        store = Store(old_url, busy_seconds=10)
        yield store
        assert violations(store, closed=False) == []
        store.close()

    def test_nothing_of_it_has_changed(self, store: Store, old_url: str) -> None:
        command.check(revisions.alembic_config(old_url))
        found = {job.id: job for job in store.jobs.jobs(most=9)}
        assert {*found, "loading"} == {each.value for each in JobState}
        assert all(job.state.value == job_id and job.identity is None for job_id, job in found.items())
        counts = found["running"].counts
        assert (counts.total, counts.succeeded, counts.failed, counts.pending) == (6, 2, 1, 3)
        assert found["running"].adapters == (Adapter("a", "/adapters/a"),)
        assert {job_id for job_id, job in found.items() if job.counts.finish_reasons is not None} == {"queued"}
        ((*rows,),) = store.jobs.output_pages("completed", states=frozenset(RequestState), page=9)
        assert [row.state for row in rows] == ["succeeded", "failed", "succeeded"]
        assert {(row.identity, row.process) for row in store.workers.rows(only_alive=False)} == {(None, None)}
        assert {each.process for each in store.recovery.holders("host")} == {None}
        assert {job.kind for job in found.values()} == {"generation"}

    def test_what_is_unfinished_takes_the_model_of_its_next_claim(self, store: Store) -> None:
        held = Adapter("a", "/adapters/a", identity="weights=7")
        newer = mill.session(store, name="newer", adapters=[held], identity="weights=1")
        claimed = [*mill.claim(store, newer), *mill.claim(store, newer), *mill.claim(store, newer)]
        assert {each.lease.job_id for each in claimed} == {"queued", "running"}
        for job_id, adapters in (("queued", ()), ("running", (held,))):
            job = store.jobs.job(job_id)
            assert (job.identity, job.adapters) == ("weights=1", adapters)
        mill.save(store, newer, [mill.answered(each) for each in claimed])
        another = mill.session(store, name="another", adapters=[Adapter("a", "/adapters/a")], identity="weights=2")
        assert mill.claim(store, another) == ()
        taken = store.recovery.take_back(1, generation=1)  # what the old worker held
        assert taken == 2
        assert mill.claim(store, another) == ()
        mill.work_off(store, newer)
        assert {store.jobs.job(each).state for each in ("queued", "running")} == {JobState.COMPLETED}

    def test_finish_reasons_are_told_of_what_was_answered_since_alone(self, store: Store) -> None:
        held = Adapter("a", "/adapters/a", identity="weights=7")
        store.recovery.take_back(1, generation=1)
        mill.work_off(store, mill.session(store, adapters=[held]))
        assert store.jobs.job("queued").counts.finish_reasons == FinishReasons(stop=3, length=0)
        assert store.jobs.job("running").counts.finish_reasons is None

    def test_the_loading_is_known_of_runs_that_began_since_alone(self, store: Store) -> None:
        newer = mill.session(store)
        store.registration.imported(newer.worker_id, newer.generation, seconds=4.0)
        mill.claim(store, newer)
        with store.database.read() as connection:
            found = connection.execute(select(runs)).all()
        known = {row.worker_id for row in found if (row.loading_since is not None, row.torch_load_seconds) == (True, 4)}
        assert known == {newer.worker_id}
        assert {row.torch_load_seconds for row in found if row.worker_id != newer.worker_id} == {None}
        effort = store.usage.of("completed")
        assert (effort.torch_wait_seconds, effort.model_wait_seconds) == (0.0, 0.0)

    def test_what_is_finished_has_none_and_can_be_retried(self, store: Store) -> None:
        assert {store.jobs.job(each).identity for each in ("completed", "cancelled")} == {None}
        assert store.retries.retry("completed").moved == 1
        mill.work_off(store, mill.session(store, identity="weights=2"))
        assert store.jobs.job("completed").identity == "weights=2"

    def test_what_was_loading_is_deleted(self, store: Store) -> None:
        assert store.creation.discard_expired(store.creation.expired(lease_seconds=60)) == ["loading"]


def test_an_embedded_store_of_before_identities_upgrades_itself() -> None:
    settings = load_settings()
    settings.home.mkdir(parents=True)
    old_store.build(settings.database, revision="0004")
    store = revisions.open_store(settings)
    assert (store.revision(), store.jobs.job("running").identity) == (REVISION, None)
    store.close()
    assert [path.name.split(".")[1] for path in settings.home.glob("batchmill.0004.*.db")] == ["0004"]


def test_any_other_store_refuses_to_work_and_names_the_command(tmp_path: Path) -> None:
    settings = load_settings(database_url=f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(SchemaMismatch, match="batchmill db upgrade"):
        revisions.open_store(settings)


def test_db_upgrade_works_from_a_wheel_in_an_empty_folder(tmp_path: Path) -> None:
    wheel = build_wheel(copy_sources(tmp_path / "source"), tmp_path / "dist")
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(site), "BATCHMILL_DATABASE_URL": f"sqlite:///{empty}/s.db"}
    code = "from batchmill import migrations; print(migrations.__file__);"
    code += "from batchmill.producer.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "db", "upgrade"], cwd=empty, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert f"revision {REVISION}" in done.stderr
    Store(f"sqlite:///{empty}/s.db").check_revision()


def set_revision(url: str, revision: str) -> None:
    store = Store(url)
    with store.database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
    store.close()


def test_a_store_that_cannot_be_reached_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="cannot use the store"):
        revisions.upgrade("postgresql://mill:hunter2@127.0.0.1:1/mill")
    with pytest.raises(StoreUnavailable):
        revisions.upgrade(f"sqlite:///{tmp_path}/no/such/folder/s.db")


def test_a_disk_that_is_full_at_the_first_use_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def upgrade(*_: object) -> None:
        raise OperationalError("CREATE TABLE", {}, sqlite3.OperationalError("database or disk is full"))

    monkeypatch.setattr(command, "upgrade", upgrade)
    with pytest.raises(StoreFull, match="no space left"):
        revisions.upgrade(f"sqlite:///{tmp_path}/s.db")
