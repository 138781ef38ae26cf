"""The batches that a child holds: requests that wait, are in flight, or are answered and not yet saved.

Plain bookkeeping: no threads, no database, no engine. The saver guards it with its lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from batchmill.jobs.models.device_memory import Memory
from batchmill.jobs.requests.request import MAX_BATCH_SIZE, Output, Request, RequestKey
from batchmill.jobs.store.bounds import cut
from batchmill.jobs.store.leases.lease import BatchReport, Claimed, Lease, SyncResult


@dataclass(slots=True)
class HeldBatch:
    """One batch that is held. A request is in `waiting`, then `in_flight`, then `answered` until it is saved."""

    lease: Lease
    waiting: deque[Request]
    #: The bytes of one request, on average.
    request_bytes: float = 0.0
    in_flight: dict[int, Request] = field(default_factory=dict)
    answered: list[Output] = field(default_factory=list)
    untouched: bool = True
    memory: Memory = field(default_factory=Memory)


class Holdings:
    """All batches that are held, in the order in which they were claimed.

    `admission_order`: the engine's, for the requests of one batch.
    """

    def __init__(self, admission_order: Callable[[Sequence[Request]], Sequence[Request]] = tuple) -> None:
        self._admission_order = admission_order
        self._by_batch: dict[int, HeldBatch] = {}
        self._batch_of: dict[RequestKey, int] = {}
        #: Requests that the store knows to be in flight and that the engine has not got yet.
        self.recorded: deque[tuple[RequestKey, Request]] = deque()
        #: Tokens that the engine has answered so far of requests in flight.
        self.tokens: Mapping[RequestKey, int] = {}

    def __bool__(self) -> bool:
        return bool(self._by_batch)

    @property
    def waiting(self) -> int:
        """Requests that are claimed and not recorded as in flight."""
        return sum(len(each.waiting) for each in self._by_batch.values())

    @property
    def size_bytes(self) -> float:
        """Bytes of the requests that are claimed and not answered, as the store has them."""
        held = self._by_batch.values()
        return sum(each.request_bytes * (len(each.waiting) + len(each.in_flight)) for each in held)

    @property
    def unsaved(self) -> int:
        """Outputs that no commit holds yet."""
        return sum(len(each.answered) for each in self._by_batch.values())

    def answer(self, outputs: Iterable[Output]) -> None:
        """Takes outputs of the engine; those of batches that were dropped are forgotten."""
        for output in outputs:
            batch_id = self._batch_of.pop(output.key, None)
            if batch_id is not None:
                holding = self._by_batch[batch_id]
                del holding.in_flight[output.key.index]
                holding.answered.append(output)

    def next_request(self, *, room: int, memory: Memory, release: bool) -> SyncRequest:
        """Returns the next request of a sync: all unsaved outputs, and up to `room` more requests in flight.

        `memory`: since the last call. Each batch reports the peak since it was claimed, and its part of the energy.
        """
        self._remember(memory)
        request = SyncRequest([], {})
        for batch_id, holding in self._by_batch.items():
            entering = 0 if release else min(max(room, 0), len(holding.waiting))
            room -= entering
            request.entering[batch_id] = entering
            begun = list(holding.in_flight)
            next_ones = [holding.waiting[place].index for place in range(entering)]
            request.reports.append(
                BatchReport(
                    holding.lease,
                    outputs=tuple(holding.answered),
                    in_flight=tuple(begun + next_ones),
                    in_flight_tokens=sum(self.tokens.get(RequestKey(holding.lease.job_id, each), 0) for each in begun),
                    memory=holding.memory,
                    untouched=holding.untouched and not entering,
                    release=release,
                )
            )
        return request

    def _remember(self, memory: Memory) -> None:
        """Counts the memory to every batch, and divides the energy among those that were worked on."""
        worked_on = sum(not each.untouched for each in self._by_batch.values())
        for each in self._by_batch.values():
            part = 0.0 if each.untouched else 1 / worked_on
            each.memory = each.memory.and_then(memory, part=part)

    def absorb(self, request: SyncRequest, result: SyncResult) -> list[RequestKey]:
        """Takes the result of a sync. Returns the keys that the engine is to forget."""
        gone = result.lost | result.finished | result.cancelled | result.released
        forgotten = self._drop(gone)
        for each in request.reports:
            holding = self._by_batch.get(each.lease.batch_id)
            if holding is not None:
                del holding.answered[: len(each.outputs)]
        self.enter(request)
        for claimed in result.claimed:
            self._hold(claimed)
        return forgotten

    def enter(self, request: SyncRequest) -> None:
        """Lets requests enter the engine, since the store knows now that they are in flight."""
        for batch_id, count in request.entering.items():
            if batch_id in self._by_batch:
                self._enter(self._by_batch[batch_id], count)

    def _hold(self, claimed: Claimed) -> None:
        request_bytes = claimed.size_bytes / max(1, len(claimed.requests))
        recorded, rest = claimed.requests[: claimed.in_flight], claimed.requests[claimed.in_flight :]
        # Requests that the store has recorded as in flight come first, in its order.
        waiting = deque([*recorded, *self._admission_order(rest)])
        holding = HeldBatch(claimed.lease, waiting, request_bytes)
        self._by_batch[claimed.lease.batch_id] = holding
        self._enter(holding, claimed.in_flight)

    def _enter(self, holding: HeldBatch, count: int) -> None:
        """Takes the next requests of a batch, which are recorded as in flight now, for the engine."""
        for _ in range(count):
            request = holding.waiting.popleft()
            key = RequestKey(holding.lease.job_id, request.index)
            holding.in_flight[request.index] = request
            holding.untouched = False
            self._batch_of[key] = holding.lease.batch_id
            self.recorded.append((key, request))

    def _drop(self, batch_ids: Collection[int]) -> list[RequestKey]:
        forgotten = []
        for batch_id in batch_ids:
            holding = self._by_batch.pop(batch_id, None)
            if holding is not None:
                forgotten += [RequestKey(holding.lease.job_id, index) for index in holding.in_flight]
        for key in forgotten:
            del self._batch_of[key]
        if forgotten:
            gone = set(forgotten)
            self.recorded = deque(each for each in self.recorded if each[0] not in gone)
        return forgotten


@dataclass(frozen=True, slots=True)
class SyncRequest:
    """One sync's request to the store."""

    reports: list[BatchReport]
    #: By batch, the number of waiting requests that enter the engine once it is committed.
    entering: dict[int, int]

    @property
    def more(self) -> bool:
        """True where outputs were left for the next sync."""
        return any(each.more for each in self.reports)

    def first_page(self) -> SyncRequest:
        """Returns the part that one transaction takes: outputs up to a page of bytes.

        A batch with more outputs is marked so, and not released yet.
        """
        reports = []
        sizes = (output.size_bytes for each in self.reports for output in each.outputs)
        room = cut(sizes, most=MAX_BATCH_SIZE)[0]
        for each in self.reports:
            count = min(room, len(each.outputs))
            room -= count
            more = count < len(each.outputs)
            reports.append(replace(each, outputs=each.outputs[:count], more=True, release=False) if more else each)
        return SyncRequest(reports, self.entering)
