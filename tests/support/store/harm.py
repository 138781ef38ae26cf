"""A sound store, and harm done to it by hand, one thing at a time, as a database without constraints lets it happen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from sqlalchemy import create_engine, text

from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import metadata
from tests.support.store.mill import answered, claim, load, save, session, work_off

#: Does a statement of SQL for as long as the block runs.
Harmed = Callable[[str], AbstractContextManager[None]]


def sound(store: Store) -> None:
    """A closed job with a failed request, and after it an open one with a batch of each state.

    Batches 1, 2 and 3 are done, 4 is leased with two answers, 5 is pending.
    """
    load(store, 8)
    who = session(store)
    first = claim(store, who)[0]
    save(store, who, [answered(first, error=ErrorCode.ENGINE_ERROR)])
    work_off(store, who)
    load(store, 12)
    done, held = claim(store, who)[0], claim(store, who)[0]
    save(store, who, [answered(done)])
    save(store, who, [answered(held, count=2)])


@contextmanager
def without_constraints(store: Store) -> Iterator[Harmed]:
    """Every table becomes a plain one, as if the database were no help, with a copy of what it held."""
    engine = create_engine(store.database.url)
    cascade = "" if store.database.is_sqlite else " CASCADE"
    with engine.connect() as connection:
        for name in metadata.tables:
            connection.execute(text(f"CREATE TABLE kept_{name} AS SELECT * FROM {name}"))  # noqa: S608
            connection.execute(text(f"DROP TABLE {name}{cascade}"))
            connection.execute(text(f"CREATE TABLE {name} AS SELECT * FROM kept_{name}"))  # noqa: S608
        connection.commit()

        @contextmanager
        def harmed(harm: str) -> Iterator[None]:
            connection.execute(text(harm))
            connection.commit()
            yield
            for name in metadata.tables:
                connection.execute(text(f"DELETE FROM {name}"))  # noqa: S608
                connection.execute(text(f"INSERT INTO {name} SELECT * FROM kept_{name}"))  # noqa: S608
            connection.commit()

        yield harmed
    engine.dispose()
