"""Suffixes of files: the format in which answers are written and prompts are read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from batchmill.jobs.errors import UsageError
from batchmill.jobs.runtime.files import formats
from batchmill.jobs.store.store import Store
from batchmill.producer.cli.jobs import results
from batchmill.producer.cli.submit import submit
from tests.support.paths import ROOT
from tests.support.store import mill


@pytest.mark.parametrize(
    ("out", "asked", "form"),
    [
        (None, None, "jsonl"),
        (None, "csv", "csv"),
        ("a.jsonl", None, "jsonl"),
        ("a.ndjson", None, "jsonl"),
        ("a.json", None, "jsonl"),
        ("a.csv", None, "csv"),
        ("folder.jsonl/A.CSV", None, "csv"),
        ("a.jsonl", "openai", "openai"),
        ("a.csv", "csv", "csv"),
        ("a.out", None, "jsonl"),
        ("a", "csv", "csv"),
        (".csv", None, "jsonl"),
        ("a.txt", "openai", "openai"),
        ("/dev/stdout", "csv", "csv"),
    ],
)
def test_the_suffix_decides_how_answers_are_written(out: str | None, asked: str | None, form: str) -> None:
    assert formats.written_as(None if out is None else Path(out), asked) == form


@pytest.mark.parametrize(
    ("out", "asked", "said"),
    [
        ("a.csv", "jsonl", "-o a.csv means csv, and --format says jsonl; leave --format out, or name a .jsonl file"),
        ("a.csv", "openai", "-o a.csv means csv, and --format says openai"),
        ("a.jsonl", "csv", "-o a.jsonl means jsonl, and --format says csv; leave --format out, or name a .csv file"),
        ("a.JSON", "csv", "-o a.JSON means jsonl"),
        ("a.parquet", None, "-o a.parquet: answers are not written as Parquet; name a .jsonl or .csv file"),
        ("a.jsonl.gz", "jsonl", "-o a.jsonl.gz: answers are not written as gzip"),
        ("a.tsv", "csv", "-o a.tsv: answers are not written as tab-separated values"),
    ],
)
def test_a_suffix_that_means_something_else_is_refused(out: str, asked: str | None, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        formats.written_as(Path(out), asked)
    assert str(caught.value).startswith(said)
    assert caught.value.exit_code == 2


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sqlite_url: str) -> str:
    """A cancelled job of two requests."""
    monkeypatch.setenv("BATCHMILL_DATABASE_URL", sqlite_url)
    monkeypatch.chdir(tmp_path)
    store = Store(sqlite_url)
    job_id = mill.load(store, 2)
    store.closing.cancel(job_id)
    store.close()
    return job_id


def invoke(command: Any, *words: str) -> Result:
    return CliRunner().invoke(command, words)


def test_results_write_what_the_suffix_says(job: str, tmp_path: Path) -> None:
    for out in ("a.csv", "a.jsonl", "a.unknown"):
        assert invoke(results, job, "-o", out).exit_code == 0
    rows = csv.DictReader((tmp_path / "a.csv").read_text().splitlines())
    assert [row["error_code"] for row in rows] == ["cancelled"] * 2
    for out in ("a.jsonl", "a.unknown"):
        lines = [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]
        assert [line["error"]["code"] for line in lines] == ["cancelled"] * 2


def test_a_contradiction_is_told_before_anything_is_written(job: str, tmp_path: Path) -> None:
    done = invoke(results, job, "-o", "a.csv", "--format", "jsonl")
    assert isinstance(done.exception, UsageError)
    assert str(done.exception).startswith("-o a.csv means csv")
    assert not (tmp_path / "a.csv").exists()


def test_the_guide_has_the_table() -> None:
    rows = [line for line in (ROOT / "docs/guides/prompt-files.md").read_text().splitlines() if line.startswith("| `.")]
    for suffix in (*formats.READ_AS, *formats.WRITTEN_AS, *formats.NOT_WRITTEN):
        (row,) = (each for each in rows if f"`{suffix}`" in each.split("|")[1])
        _, _, prompts, answers, _ = row.split("|")
        assert ("a prompt per line" in prompts) == (formats.read_as(f"p{suffix}") == "text")
        assert ("refused" in answers) == (suffix in formats.NOT_WRITTEN)
        for form in formats.ANSWERS:
            assert (f"`{form}`" in answers) == (form in formats.WRITTEN_AS.get(suffix, ())), (suffix, form)


def test_the_help_names_the_suffixes() -> None:
    assert ".csv is a table" in " ".join(invoke(results, "--help").output.split())
    assert "(default for .txt)" in " ".join(invoke(submit, "--help").output.split())


def test_submit_takes_the_form_and_keeps_jobs_apart_by_it(job: str, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text('{"prompt": "one"}\n' * 2)
    done = invoke(submit, str(path), "-m", "echo")
    assert "looks like JSON Lines" in str(done.exception)
    forms = ("text", "jsonl", "text")
    found = [invoke(submit, str(path), "-m", "echo", "--once", "--format", form) for form in forms]
    assert found[0].stdout == found[2].stdout != found[1].stdout
    assert "was submitted before" in found[2].stderr
