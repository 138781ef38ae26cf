"""Marks of workers in Redis: whose mark tells of another store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from batchmill.jobs.broker.client import Broker
from batchmill.jobs.broker.embedded import EmbeddedRedis
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.store import Store
from batchmill.worker.process.maintenance.namesakes import Namesakes
from tests.support.store import mill


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    server = EmbeddedRedis(tmp_path)
    server.start()
    with closing(Broker(f"redis+socket://{tmp_path}/redis.sock")) as broker:
        yield broker
    server.stop()


def test_a_worker_that_the_store_does_not_know_is_met_by_a_mark_of_this_format_alone(
    sqlite_url: str, broker: Broker
) -> None:
    own = Process.own()
    assert own is not None
    stranger = {"worker": "second", "process": str(replace(own, start_ticks=own.start_ticks - 1))}
    with closing(Store(sqlite_url)) as store:
        who = mill.session(store, process=own)
        namesakes = Namesakes(store, broker, who.worker_id, name="first", process=own)
        namesakes.look()
        for form, met in ((2, []), (None, []), (1, ["second"])):
            broker.mark(store.id, json.dumps(stranger | {"format": form}), seconds=60)
            namesakes.look()
            assert store.workers.namesakes() == met
