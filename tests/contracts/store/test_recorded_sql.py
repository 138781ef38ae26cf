"""The SQL of a sync is the recorded one: a change of the code alone leaves every statement as it was.

A change that is meant: `RECORD_SQL=1 pytest tests/contracts/store/test_recorded_sql.py` writes the recordings anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine, event

from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.store.leases.lease import BatchReport
from batchmill.jobs.store.store import Store
from tests.support.paths import ROOT
from tests.support.store import mill

RECORDED = ROOT / "tests/support/store/recorded_sql"


@contextmanager
def statements() -> Iterator[list[str]]:
    """The statements of the block, each once, in the order in which they come first."""
    found: dict[str, None] = {}

    def note(_connection: Any, _cursor: Any, statement: str, _values: Any, _context: Any, _many: bool) -> None:
        found.setdefault(" ".join(statement.split()))

    listed: list[str] = []
    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield listed
    finally:
        event.remove(Engine, "before_cursor_execute", note)
        listed += found


def synced(store: Store) -> list[str]:
    """Executes a worker's syncs: claims, saves, renewals, ends, strays and a cancel. Returns the statements."""
    adapter = Adapter("a", "sha256:1")
    first, named, last = mill.load(store, 6, batch_size=3), mill.load_named(store, "a", None), mill.load(store, 2)
    who, other = mill.session(store, adapters=[adapter]), mill.session(store, name="other")
    with statements() as found:
        claimed = mill.claim(store, who, wanted=6, room=4)
        answers = mill.answered(claimed[0], count=2)
        mill.save(
            store, who, [replace(answers, in_flight=(2,)), mill.answered(claimed[1], error=ErrorCode.ENGINE_ERROR)]
        )
        mill.save(store, who, [mill.answered(claimed[0])])
        both = mill.claim(store, who, wanted=3)
        store.leases.sync(who, [], wanted_requests=0, resumed=True)
        mill.work_off(store, who)
        store.leases.sync(who, [BatchReport(each.lease, release=True) for each in both])
    assert {store.jobs.job(job_id).state.value for job_id in (first, named, last)} == {"completed"}
    cancelled = mill.load(store, 3)
    (held,) = mill.claim(store, other, wanted=3)
    store.closing.cancel(cancelled)
    with statements() as more:
        store.leases.sync(other, [BatchReport(held.lease)])
    return list(dict.fromkeys(found + more))


def test_a_sync_executes_the_recorded_statements(store: Store, request: pytest.FixtureRequest) -> None:
    recording = RECORDED / f"{store.database.url.get_backend_name()}.sql"
    executed = "".join(f"{each};\n" for each in synced(store))
    if os.environ.get("RECORD_SQL"):
        recording.parent.mkdir(exist_ok=True)
        recording.write_text(executed)
    assert executed.count("\n") > 20
    assert executed == recording.read_text()
