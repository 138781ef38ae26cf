"""The child's bookkeeping: no request is lost, doubled, or in two places at once."""

from __future__ import annotations

from batchmill.jobs.models.device_memory import Memory
from batchmill.jobs.requests.generation import GenerationRequest
from batchmill.jobs.requests.request import RequestKey
from batchmill.jobs.store.leases.lease import Claimed, Lease, SyncResult
from batchmill.worker.loop.holdings import Holdings
from tests.support.store.mill import output


def claimed(batch_id: int = 1, *, first: int = 0, count: int = 3, in_flight: int = 0) -> Claimed:
    prompts = tuple(GenerationRequest(index, f"r{index}", prompt="x") for index in range(first, first + count))
    return Claimed(Lease(batch_id, 1, 10 + batch_id, "job"), prompts, in_flight)


def holding(*batches: Claimed) -> Holdings:
    holdings = Holdings()
    synced(holdings, SyncResult(claimed=batches))
    return holdings


def synced(holdings: Holdings, result: SyncResult, *, room: int = 0) -> list[RequestKey]:
    request = holdings.next_request(room=room, memory=Memory(), release=False)
    return holdings.absorb(request, result)


def take(holdings: Holdings) -> list[int]:
    taken = [key.index for key, _ in holdings.recorded]
    holdings.recorded.clear()
    return taken


def test_a_request_enters_the_engine_only_after_it_was_recorded() -> None:
    holdings = holding(claimed(in_flight=1))
    assert take(holdings) == [0]
    request = holdings.next_request(room=1, memory=Memory(), release=False)
    assert request.reports[0].in_flight == (0, 1)
    assert take(holdings) == []
    holdings.absorb(request, SyncResult())
    assert take(holdings) == [1]
    assert holdings.waiting == 1


def test_room_is_shared_by_the_batches_in_the_order_of_their_claims() -> None:
    holdings = holding(claimed(1), claimed(2, first=3))
    request = holdings.next_request(room=4, memory=Memory(), release=False)
    assert [each.in_flight for each in request.reports] == [(0, 1, 2), (3,)]
    assert [each.untouched for each in request.reports] == [False, False]
    assert [each.untouched for each in holdings.next_request(room=2, memory=Memory(), release=False).reports] == [
        False,
        True,
    ]


def test_what_is_in_flight_is_said_with_the_tokens_it_has() -> None:
    holdings = holding(claimed(1, in_flight=2), claimed(2, first=3, in_flight=1))
    holdings.tokens = {RequestKey("job", 0): 5, RequestKey("job", 1): 2, RequestKey("job", 3): 4}
    holdings.answer([output("job", 1)])
    request = holdings.next_request(room=1, memory=Memory(), release=False)
    assert [each.in_flight_tokens for each in request.reports] == [5, 4]


def test_outputs_that_came_while_a_turn_was_under_way_wait_for_the_next() -> None:
    holdings = holding(claimed(in_flight=3))
    holdings.answer([output("job", 0)])
    request = holdings.next_request(room=0, memory=Memory(), release=False)
    holdings.answer([output("job", 1)])
    holdings.absorb(request, SyncResult())
    assert holdings.unsaved == 1
    (held,) = holdings.next_request(room=0, memory=Memory(), release=False).reports
    assert [each.key.index for each in held.outputs] == [1]
    assert held.in_flight == (2,)


def test_a_dropped_batch_is_forgotten_and_the_engine_told() -> None:
    holdings = holding(claimed(1, in_flight=2), claimed(2, first=3, in_flight=3))
    holdings.recorded.popleft()
    holdings.answer([output("job", 0)])
    forgotten = synced(holdings, SyncResult(lost=frozenset({1})))
    assert forgotten == [RequestKey("job", 1)]
    assert take(holdings) == [3, 4, 5]
    holdings.answer([output("job", 1)])  # the engine finished it in the meantime
    assert holdings.unsaved == 0
    synced(holdings, SyncResult(finished=frozenset({2})))
    assert not holdings


def test_a_release_says_so_and_enters_nothing() -> None:
    holdings = holding(claimed(in_flight=1))
    (held,) = holdings.next_request(room=9, memory=Memory(), release=True).reports
    assert held.release
    assert held.in_flight == (0,)


def test_a_batch_enters_the_engine_in_the_engines_order_after_what_is_recorded() -> None:
    holdings = Holdings(lambda requests: list(reversed(requests)))
    synced(holdings, SyncResult(claimed=(claimed(1, count=5, in_flight=1),)), room=0)
    synced(holdings, SyncResult(), room=3)
    assert take(holdings) == [0, 4, 3, 2]
    synced(holdings, SyncResult(), room=3)
    assert take(holdings) == [1]
