"""Random bytes and random texts as prompt files: taken whole or refused whole, and exported as they came."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchmill.jobs.errors import UsageError
from batchmill.jobs.store.store import Store
from tests.support.whole_files import answer, counted, exported, load

BOM = b"\xef\xbb\xbf"
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
CUSTOM_ID = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=256)
NEARLY = st.sampled_from([
    b'{"prompt":"a"}', b'{"prompt":"\\u0000"}', b'{"custom_id":"a","prompt":"b"}', b"\n", b"\r\n", BOM, b"\xff", b"\0",
    b'{"messages":[{"role":"user","content":"a"}]}', b'"', b"{", b"}", b"\xe2\x80\xa8", b"1e999", b"\\ud800", b" ",
])  # fmt: skip
BYTES = st.binary(max_size=200) | st.lists(NEARLY | st.binary(max_size=3), max_size=12).map(b"".join)


def fuzz(examples: int) -> Callable[[Any], Any]:
    return settings(max_examples=examples, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_any_bytes(store: Store, path: Path, data: bytes) -> None:
    """Taken whole or refused whole; whatever else is raised fails the test."""
    path.write_bytes(data)
    before = counted(store)
    try:
        job_id = load(store, path)
    except UsageError:  # whose exit code is 2
        assert counted(store) == before
    else:
        total = store.jobs.job(job_id).counts.total
        assert total > 0
        assert counted(store) == (before[0] + 1, before[1] + 1, before[2] + total)


def check_round_trip(store: Store, folder: Path, records: list[tuple[str, str]], ascii_only: bool) -> None:
    path = folder / "p.jsonl"
    lines = [json.dumps({"custom_id": name, "prompt": text}, ensure_ascii=ascii_only) for name, text in records]
    path.write_bytes("\n".join(lines).encode())
    job_id = load(store, path)
    answer(store)
    for form in ("jsonl", "openai", "csv"):
        assert exported(store, job_id, folder, form) == records


RECORDS = st.lists(st.tuples(CUSTOM_ID, TEXT), min_size=1, max_size=5, unique_by=lambda each: each[0])


@given(data=BYTES, name=st.sampled_from(["p.jsonl", "p.txt"]))
@fuzz(100)
def test_any_bytes_are_taken_whole_or_refused_whole(store: Store, tmp_path: Path, data: bytes, name: str) -> None:
    check_any_bytes(store, tmp_path / name, data)


@pytest.mark.slow
@given(data=BYTES, name=st.sampled_from(["p.jsonl", "p.txt"]))
@pytest.mark.timeout(900)
@fuzz(2_000)
def test_many_bytes_are_taken_whole_or_refused_whole(store: Store, tmp_path: Path, data: bytes, name: str) -> None:
    check_any_bytes(store, tmp_path / name, data)


@given(records=RECORDS, ascii_only=st.booleans())
@fuzz(25)
def test_texts_come_back_byte_for_byte_through_store_and_export(
    store: Store, tmp_path: Path, records: list[tuple[str, str]], ascii_only: bool
) -> None:
    check_round_trip(store, tmp_path, records, ascii_only)


@pytest.mark.slow
@given(records=RECORDS, ascii_only=st.booleans())
@pytest.mark.timeout(900)
@fuzz(500)
def test_many_texts_come_back_byte_for_byte_through_store_and_export(
    store: Store, tmp_path: Path, records: list[tuple[str, str]], ascii_only: bool
) -> None:
    check_round_trip(store, tmp_path, records, ascii_only)
