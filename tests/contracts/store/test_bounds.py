"""Long lines: batches, claims, turns and pages are bounded by bytes as well as by rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, select

from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.models.device_memory import Memory
from batchmill.jobs.requests.generation import GenerationRequest
from batchmill.jobs.requests.states import RequestState
from batchmill.jobs.store import bounds
from batchmill.jobs.store.bounds import PAGE_BYTES, cut
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.leases.lease import BatchReport, SyncResult
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import batches, requests
from batchmill.producer.files.prompt_file import PromptFile
from batchmill.producer.submission import Submission
from batchmill.producer.submit import load_job
from batchmill.worker.loop.holdings import Holdings
from tests.support.store import mill

MIB = 1024**2
ALL = frozenset(RequestState)


def long(count: int, *, mib: float = 3.0, first: int = 0) -> list[GenerationRequest]:
    """Requests of two characters of three bytes each, again and again."""
    text = "\u4f60\u597d" * int(mib * MIB / 6)
    return [GenerationRequest(index, f"request-{index}", prompt=text) for index in range(first, first + count)]


def load(store: Store, *pages: list[GenerationRequest], batch_size: int = 64) -> str:
    job_id = mill.begin(store, batch_size=batch_size)
    for page in pages:
        store.creation.add(job_id, prompts=page, batch_size=batch_size, lease_seconds=60)
    store.creation.open(job_id, spec=mill.ECHO_SPEC, file_sha256="0" * 64, fingerprint="f", lease_seconds=60)
    return job_id


def held_by_batches(store: Store) -> list[list[int]]:
    """The indexes of each batch that has any, by the batch's id; the batch says the same number."""
    with store.database.read() as connection:
        total: dict[int, int] = {row.id: row.total for row in connection.execute(select(batches.c.id, batches.c.total))}
        rows = connection.execute(select(requests.c.batch_id, requests.c.index).order_by(requests.c.index)).all()
    found: dict[int, list[int]] = {}
    for batch_id, index in rows:
        found.setdefault(batch_id, []).append(index)
    assert {each: len(indexes) for each, indexes in found.items()} == {each: n for each, n in total.items() if n}
    return [found[each] for each in sorted(found)]


@pytest.mark.parametrize(
    ("sizes", "most", "filled", "parts"),
    [
        ([1, 1, 1, 1, 1], 2, (0, 0), [2, 2, 1]),
        ([1, 1, 1], 2, (1, 10), [1, 2]),
        ([1], 2, (2, 10), [0, 1]),
        ([PAGE_BYTES, 1, PAGE_BYTES - 1, 1], 9, (0, 0), [1, 2, 1]),
        ([3 * PAGE_BYTES, 3 * PAGE_BYTES], 9, (0, 0), [1, 1]),
        ([1], 9, (3, PAGE_BYTES), [0, 1]),
        ([3 * PAGE_BYTES], 9, (1, 1), [0, 1]),
        ([], 9, (1, 1), [0]),
    ],
)
def test_where_a_batch_or_a_page_closes(sizes: list[int], most: int, filled: tuple[int, int], parts: list[int]) -> None:
    assert cut(sizes, most=most, filled=filled) == parts


def test_a_batch_closes_at_its_requests_or_at_8_mib_whichever_comes_first(store: Store) -> None:
    short = mill.prompts(5, first=6)
    load(store, long(5), [*long(1, first=5), *short], long(2, mib=9, first=11), batch_size=4)
    assert held_by_batches(store) == [[0, 1], [2, 3], [4, 5, 6, 7], [8, 9, 10], [11], [12]]


def test_a_claim_brings_a_page_of_bytes_and_the_next_the_rest(store: Store) -> None:
    load(store, long(8))
    who = mill.session(store)
    assert [len(each.requests) for each in mill.claim(store, who, wanted=64)] == [2, 2]
    (first, _) = claimed = mill.claim(store, who, wanted=64)
    assert len(claimed) == 2
    assert 6 * MIB <= first.size_bytes <= PAGE_BYTES


def test_pages_of_outputs_are_cut_by_bytes_of_prompt_and_answer(store: Store) -> None:
    job_id = load(store, long(6), mill.prompts(3, first=6))
    who = mill.session(store)
    answers = {3: "x" * 7 * MIB, 7: "x" * 9 * MIB}
    while claimed := mill.claim(store, who, wanted=1):
        for each in claimed:
            outputs = [mill.output(job_id, one.index, text=answers.get(one.index, "x")) for one in each.requests]
            mill.save(store, who, [BatchReport(each.lease, outputs=outputs)])
    pages = [[row.index for row in page] for page in store.jobs.output_pages(job_id, states=ALL, page=5)]
    assert pages == [[0, 1], [2], [3], [4, 5, 6], [7], [8]]
    short = [[row.index for row in page] for page in store.jobs.output_pages(job_id, states=ALL, page=2)]
    assert short == [[0, 1], [2], [3], [4, 5], [6], [7], [8]]


def test_a_retry_makes_batches_by_the_same_rule_in_pages_of_bytes(store: Store) -> None:
    job_id = load(store, long(5), mill.prompts(3, first=5), batch_size=3)
    store.closing.cancel(job_id)
    with transactions(store) as moved:
        assert store.retries.retry(job_id).moved == 8
    assert held_by_batches(store) == [[0, 1], [2, 3], [4, 5, 6], [7]]
    assert max(moved) <= PAGE_BYTES
    assert store.jobs.job(job_id).counts.pending == 8


def test_suspects_of_a_crash_run_in_groups_of_the_same_bound(store: Store) -> None:
    """Batches from before there was a bound of bytes are split by it, too."""
    load(store, long(7), batch_size=64)
    with store.database.write() as connection:
        connection.execute(requests.update().values(batch_id=1))
        connection.execute(batches.update().values(total=0, state="done"))
        connection.execute(batches.update().where(batches.c.id == 1).values(total=7, state="pending"))
    who = mill.session(store)
    mill.claim(store, who, wanted=7, room=7)
    assert store.recovery.take_back(who.worker_id, generation=who.generation) == 1
    assert held_by_batches(store) == [[0, 1], [2, 3], [4, 5], [6]]


def test_a_crash_of_many_long_requests_is_taken_back_in_short_transactions(store: Store) -> None:
    load(store, long(8))
    who = mill.session(store)
    for _ in range(2):
        mill.claim(store, who, wanted=64, room=64)
    with transactions(store) as moved:
        assert store.recovery.take_back(who.worker_id, generation=who.generation) == 4
    assert len(moved) == 4
    assert max(moved) <= PAGE_BYTES


def test_what_a_killed_submit_left_is_deleted_in_pages_of_bytes(store: Store) -> None:
    job_id = mill.begin(store)
    store.creation.add(job_id, prompts=[*long(5), *mill.prompts(9, first=5)], batch_size=4, lease_seconds=60)
    with transactions(store) as moved:
        store.creation.discard(job_id)
    assert mill.rows(store, "requests") == mill.rows(store, "batches") == mill.rows(store, "jobs") == 0
    assert len(moved) == 3
    assert max(moved) <= PAGE_BYTES


@contextmanager
def transactions(store: Store) -> Iterator[list[int]]:
    """The bytes of bodies that each writing transaction of the block found for its page."""
    found: list[int] = []
    plain = bounds.page_of

    def page_of(database: Database, connection: Connection, chosen: Any, *, size: Any) -> list[Any]:
        page = plain(database, connection, chosen, size=size)
        if page and connection.get_execution_options().get("writes"):
            found.append(sum(row.size_bytes for row in page))
        return page

    with pytest.MonkeyPatch.context() as patch:
        for module in ("jobs.create", "leases.recovery", "jobs.retry"):
            patch.setattr(f"batchmill.jobs.store.{module}.page_of", page_of)
        yield found


def test_no_transaction_from_submit_to_save_writes_more_than_a_page(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\n".join([b"x" * 3 * MIB] * 7))
    with written() as sizes:
        job_id, _ = load_job(Submission(str(path), "echo"), store=store, settings=Settings())
        loaded, who = len(sizes), mill.session(store)
        while claimed := mill.claim(store, who, wanted=1, room=1):
            for each in claimed:
                outputs = [mill.output(job_id, one.index, text=one.prompt or "") for one in each.requests]
                mill.save(store, who, [BatchReport(each.lease, outputs=outputs)])
    assert sum(sizes[:loaded]) > 21 * MIB < sum(sizes[loaded:]), "every line was written, and every answer"
    assert max(sizes) <= PAGE_BYTES


def text_in(parameters: Any) -> int:
    """The bytes of text in a statement's parameters: one row of them or several, by name or by place."""
    if isinstance(parameters, str):
        return len(parameters)
    each = parameters.values() if isinstance(parameters, dict) else parameters
    return sum(map(text_in, each)) if isinstance(parameters, (dict, list, tuple)) else 0


@contextmanager
def written() -> Iterator[list[int]]:
    """The bytes of text that each transaction of the block has given to the database."""
    found: list[int] = []

    def begin(_connection: Connection) -> None:
        found.append(0)

    def execute(*said: Any) -> None:
        found[-1] += text_in(said[3])

    listeners = [("begin", begin), ("before_cursor_execute", execute)]
    for name, listener in listeners:
        event.listen(Engine, name, listener)
    yield found
    for name, listener in listeners:
        event.remove(Engine, name, listener)


def test_a_page_of_a_submit_is_one_line_where_lines_are_long(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\n".join([b"x" * 5 * MIB] * 3 + [b"short"] * 3))
    sizes: list[int] = []
    add = store.creation.add

    def seen(job_id: str, *, prompts: list[GenerationRequest], **more: Any) -> Any:
        sizes.append(len(prompts))
        return add(job_id, prompts=prompts, **more)

    store.creation.add = seen  # type: ignore[method-assign, assignment]
    load_job(Submission(str(path), "echo"), store=store, settings=Settings())
    assert sizes == [1, 1, 4]


def test_a_turn_says_a_page_of_outputs_and_nothing_of_the_rest_is_lost(store: Store) -> None:
    job_id = load(store, mill.prompts(6), batch_size=3)
    who, holdings = mill.session(store), Holdings()
    claimed = mill.claim(store, who, wanted=6, room=6)
    empty = holdings.next_request(room=0, memory=Memory(), release=False)
    holdings.absorb(empty, SyncResult(claimed=claimed))
    holdings.answer([mill.output(job_id, index, text="x" * 5 * MIB) for index in range(6)])
    store.closing.cancel(job_id)
    turns = 0
    while holdings:
        page = holdings.next_request(room=0, memory=Memory(), release=True).first_page()
        assert sum(len(each.outputs) for each in page.reports) == 1
        holdings.absorb(page, store.leases.sync(who, page.reports))
        turns += 1
    assert turns == 6
    states = [row.state for page in store.jobs.output_pages(job_id, states=ALL, page=9) for row in page]
    assert states == [RequestState.SUCCEEDED] * 6, "neither cancelled nor handed back before they were saved"


def test_what_is_held_is_counted_until_it_is_answered(store: Store) -> None:
    job_id = load(store, long(2))
    holdings = Holdings()
    (claimed,) = mill.claim(store, mill.session(store), wanted=2, room=2)
    holdings.absorb(holdings.next_request(room=0, memory=Memory(), release=False), SyncResult(claimed=(claimed,)))
    assert 6 * MIB <= holdings.size_bytes < 6.1 * MIB
    holdings.answer([mill.output(job_id, 0)])
    assert 3 * MIB <= holdings.size_bytes < 3.1 * MIB


def test_the_longest_line_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"x" * 11 + b"\n" + b"x" * 10 + b"\n")
    with PromptFile(str(path), max_line_bytes=10) as prompts:
        assert [line.number for line in prompts] == [2]
    monkeypatch.setenv("BATCHMILL_MAX_LINE_BYTES", "11")
    assert Settings().max_line_bytes == 11
