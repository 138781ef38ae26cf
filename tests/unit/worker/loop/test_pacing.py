"""The pacing of syncs: when the engine runs short, and how much it then gets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchmill.jobs.models.device_memory import Memory
from batchmill.jobs.requests.generation import GenerationRequest
from batchmill.jobs.store.leases.lease import Claimed, Lease, SyncResult
from batchmill.worker.loop import pacing
from batchmill.worker.loop.holdings import Holdings
from batchmill.worker.loop.pacing import Pacing
from tests.support.store.mill import output


def paced(rows: int = 8, *, recorded: int = 0, waiting: int = 0) -> Pacing:
    """The pacing of a child with `recorded` requests in flight that the engine has not got, and `waiting` more."""
    holdings = Holdings()
    if count := recorded + waiting:
        prompts = tuple(GenerationRequest(index, f"r{index}", prompt="x") for index in range(count))
        claimed = Claimed(Lease(1, 1, 11, "job"), prompts, recorded, size_bytes=10 * count)
        holdings.absorb(holdings.next_request(room=0, memory=Memory(), release=False), SyncResult(claimed=(claimed,)))
    return Pacing(rows, holdings)


@pytest.mark.parametrize(("rows", "fill"), [(1, 2), (3, 4), (8, 10), (100, 125)])
def test_a_sync_fills_up_to_a_quarter_more_than_the_rows(rows: int, fill: int) -> None:
    assert paced(rows).fill == fill
    assert paced(rows).room(draining=False) == fill
    assert paced(rows).wanted(draining=False) == rows


def test_requests_of_the_engines_own_queue_count_as_recorded() -> None:
    state = replace(paced(recorded=2, waiting=1), engine_waiting=3)
    assert state.recorded == 5
    assert state.room(draining=False) == 10 - 5
    assert state.wanted(draining=False) == 8 - 5 - 1
    assert replace(state, engine_waiting=20).wanted(draining=False) == 0
    assert replace(state, engine_waiting=20).room(draining=False) == 0


def test_the_engine_gets_what_is_recorded_up_to_the_fill_of_its_queue() -> None:
    assert paced(recorded=2).entering == 2
    assert paced(recorded=12).entering == 10
    assert replace(paced(recorded=12), engine_waiting=7).entering == 3
    assert replace(paced(recorded=12), engine_waiting=11).entering == 0


def test_a_drain_is_urgent_and_claims_and_records_nothing() -> None:
    state = paced(recorded=20)
    assert state.is_urgent(draining=True)
    assert not state.is_urgent(draining=False)
    assert paced().wanted(draining=True) == paced().room(draining=True) == 0


def test_outputs_that_were_left_for_the_next_sync_are_urgent() -> None:
    assert replace(paced(recorded=20), more=True).is_urgent(draining=False)


def test_a_short_queue_is_urgent_unless_the_last_claim_found_nothing() -> None:
    short = replace(paced(recorded=7), engine_empty=False)
    assert short.is_urgent(draining=False)
    assert not replace(short, dry=True).is_urgent(draining=False)
    assert not replace(short, engine_waiting=1).is_urgent(draining=False)
    assert replace(paced(recorded=7, waiting=1), dry=True).is_urgent(draining=False)


def test_too_many_held_bytes_claim_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "HELD_BYTES", 40)
    laden = replace(paced(recorded=4), engine_empty=False)
    assert laden.wanted(draining=False) == 0
    assert not laden.is_urgent(draining=False)
    assert laden.room(draining=False) == 6


def test_an_empty_engine_ends_its_task_soon() -> None:
    state = paced(recorded=1)
    state.holdings.recorded.clear()
    assert not replace(state, dry=True, engine_empty=False).is_urgent(draining=False)
    assert replace(state, dry=True).is_urgent(draining=False)
    state.holdings.answer([output("job", 0)])
    assert state.holdings.unsaved == 1
    assert replace(state, rows=0).is_urgent(draining=False)


def test_an_absent_store_is_asked_early_only_for_what_the_spool_can_record() -> None:
    away = replace(paced(recorded=7, waiting=1), away=True)
    assert away.is_urgent(draining=False)
    assert not replace(away, full=True).is_urgent(draining=False)
    assert not replace(away, engine_waiting=1).is_urgent(draining=False)
    assert not replace(paced(recorded=7), away=True).is_urgent(draining=True)
