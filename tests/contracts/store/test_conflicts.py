"""Conflicts that PostgreSQL ends by giving one transaction up: it is begun again at once, and nobody hears of it."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable
from pathlib import Path
from time import sleep

import pytest
from sqlalchemy import Engine, create_engine, text

import batchmill.jobs.store
from batchmill.jobs.errors import StoreConflict
from batchmill.jobs.requests.states import JobState
from batchmill.jobs.store.database import conflicts, postgresql
from batchmill.jobs.store.leases import sync
from batchmill.jobs.store.leases.lease import SyncResult
from batchmill.jobs.store.store import Store
from tests.support.store import mill


@pytest.fixture
def other(postgresql_url: str) -> Engine:
    """Somebody else's connections to the same database."""
    return create_engine(postgresql_url)


class _Job:
    """A job of one batch, which a worker has answered and not saved."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.id = mill.load(store, 4)
        self.session = mill.session(store)
        (self.batch,) = mill.claim(store, self.session)

    def save(self) -> SyncResult:
        return self.store.leases.sync(self.session, [mill.answered(self.batch)])

    def check_saved(self, turned: SyncResult) -> None:
        """Everything was done once."""
        assert (turned.finished, turned.lost) == ({self.batch.lease.batch_id}, frozenset())
        job = self.store.jobs.job(self.id)
        assert (job.state, job.counts.succeeded) == (JobState.COMPLETED, 4)
        assert mill.rows(self.store, "outputs") == 4


def _meet(monkeypatch: pytest.MonkeyPatch, first: Callable[[], None]) -> list[str]:
    """`first` happens in the midst of the next turn; each later try of it is only noted."""
    tries: list[str] = []

    def meet(name: str) -> None:
        if name == "turn.saved":
            tries.append(name)
            if len(tries) == 1:
                first()

    monkeypatch.setattr(sync, "failpoint", meet)
    return tries


def test_the_victim_of_a_deadlock_begins_again(
    postgresql_url: str, other: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn has locked its batch and wants its job; somebody else has locked the job and wants the batch."""
    store = Store(postgresql_url)
    job = _Job(store)
    with other.connect() as holder:
        # The turn is whom the server ends: the other one looks for a deadlock later.
        holder.execute(text("SET deadlock_timeout = '60s'"))
        holder.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR NO KEY UPDATE"), {"id": job.id})

        def want_the_batch() -> None:
            holder.execute(text("SELECT 1 FROM batches WHERE id = :id FOR UPDATE"), {"id": job.batch.lease.batch_id})
            holder.rollback()

        wanting = threading.Thread(target=want_the_batch)

        def deadlock() -> None:
            wanting.start()
            while not _someone_waits(other):
                sleep(0.01)

        tries = _meet(monkeypatch, deadlock)
        job.check_saved(job.save())
        wanting.join()
    assert len(tries) == 2
    other.dispose()
    store.close()


def _someone_waits(other: Engine) -> bool:
    with other.connect() as connection:
        return bool(connection.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")))


def test_what_could_not_be_serialized_begins_again(
    postgresql_url: str, other: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's row is changed after the turn has seen it, which READ COMMITTED alone would not mind."""
    begin = postgresql.BEGIN.replace("READ COMMITTED", "SERIALIZABLE")
    monkeypatch.setattr(postgresql, "BEGIN", begin)
    store = Store(postgresql_url)
    job = _Job(store)

    def change() -> None:
        with other.begin() as connection:
            connection.execute(text("UPDATE jobs SET name = 'renamed' WHERE id = :id"), {"id": job.id})

    tries = _meet(monkeypatch, change)
    job.check_saved(job.save())
    assert len(tries) == 2
    other.dispose()
    store.close()


def test_conflicts_without_end_are_told_of(postgresql_url: str, other: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = postgresql.BEGIN.replace("READ COMMITTED", "REPEATABLE READ")
    monkeypatch.setattr(postgresql, "BEGIN", begin)
    store = Store(postgresql_url)
    job = _Job(store)
    tries = []

    def change(name: str) -> None:
        if name == "turn.saved":
            tries.append(name)
            with other.begin() as connection:
                connection.execute(text("UPDATE jobs SET name = :name WHERE id = :id"), {"name": name, "id": job.id})

    monkeypatch.setattr(sync, "failpoint", change)
    with pytest.raises(StoreConflict, match="is busy: could not serialize access") as caught:
        job.save()
    assert caught.value.retryable
    assert len(tries) == conflicts.MOST_TRIES
    monkeypatch.undo()
    job.check_saved(job.save())
    other.dispose()
    store.close()


def test_every_transaction_that_writes_is_begun_again() -> None:
    """A new method of the store that writes says `@retried`, too."""
    writing = []
    for path in Path(batchmill.jobs.store.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "self._database.write()" in ast.unparse(node):
                writing.append(node.name)
                assert [ast.unparse(each) for each in node.decorator_list] == ["retried"], f"{path}:{node.lineno}"
    assert len(writing) > 15, "and they are written in this form"
