"""Hostile names in prompt files and of prompt files: they reach no path and no text of SQL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from batchmill.jobs.errors import PromptFileError, UsageError
from batchmill.jobs.store.store import Store
from batchmill.producer.files.export import errors_path
from batchmill.producer.submission import Submission
from batchmill.producer.submit import load_job
from tests.support.store import mill
from tests.support.whole_files import SETTINGS, answer, exported, load, prompt

HOSTILE = [
    "../../../etc/passwd", "/etc/passwd", "..", ".", "~", "CON", "a/b", "a\\b", "-o", "--help", "$(reboot)", "`reboot`",
    "'; DROP TABLE requests; --", '"; DELETE FROM jobs; --', "' OR '1'='1", "%s%n", "%(index)s", ":index", "?", "{0}",
    "{{7*7}}", "<script>", "=1+1", "NULL", "\U0001f600", "\u202eabc", "\u200b", "\ufeff", "a" * 256,
]  # fmt: skip


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """The text of every statement that reaches a database."""
    seen: list[str] = []

    def see(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(Engine, "before_cursor_execute", see)
    yield seen
    event.remove(Engine, "before_cursor_execute", see)


def test_hostile_names_reach_no_path_and_no_text_of_sql(store: Store, tmp_path: Path, statements: list[str]) -> None:
    folder = tmp_path / "only"
    folder.mkdir()
    path = folder / "p.jsonl"
    marked = [f"{each[:250]}|{place}|" for place, each in enumerate(HOSTILE)]  # so that each is found if it is there
    path.write_bytes(b"\n".join(prompt(each, custom_id=each) for each in [*HOSTILE, *marked]))
    submission = Submission(str(path), "echo", name=marked[12], command=marked[13], idempotency_key=marked[14])
    job_id, _ = load_job(submission, store=store, settings=SETTINGS)
    with pytest.raises(UsageError):
        load_job(submission, store=store, settings=SETTINGS)
    path.write_bytes(b"\n".join(prompt(each, custom_id=each) for each in [*marked, *marked]))
    with pytest.raises(PromptFileError):
        load(store, path)  # reads by custom_id
    answer(store)
    for form in ("jsonl", "openai", "csv"):
        assert exported(store, job_id, folder, form) == [(each, each) for each in [*HOSTILE, *marked]]
    assert {each.name for each in folder.iterdir()} == {
        "p.jsonl", "out.jsonl", "out.csv", "out.openai", errors_path(folder / "out.openai").name,
    }  # fmt: skip
    assert len(statements) > 20
    assert not [text for text in statements if any(each in text for each in marked)]
    assert mill.rows(store, "jobs") == 1


@pytest.mark.parametrize(
    "name", [b"\xff\xfe.jsonl", b"a\nb.jsonl", b"\x1b[2J.jsonl", "\u202e.jsonl".encode(), b"%s.jsonl"]
)
def test_a_file_may_have_any_name(store: Store, tmp_path: Path, name: bytes) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.write_bytes(b'{"prompt":"a"}\n')
    job = store.jobs.job(load(store, path))
    assert job.file_name.isprintable()
    path.write_bytes(b"[bad\n")
    with pytest.raises(PromptFileError) as refused:
        load(store, path)
    assert refused.value.problems[0].isprintable()
    assert refused.value.problems[0].endswith(f"{job.file_name}:1: not JSON: Expecting value at column 2")
