"""An export writes the whole file or leaves the old one: full disks, kills, links, pipes and stdout."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from batchmill.jobs.errors import BatchmillError
from batchmill.jobs.runtime.failpoints import arm
from batchmill.jobs.store.leases.lease import BatchReport
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.jobs import Job
from batchmill.producer.files import export as exporting
from batchmill.producer.files.export import export
from tests.support.processes.command import command
from tests.support.store import mill

FORMS = ["jsonl", "openai", "csv"]


@pytest.fixture
def short_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The five outputs are three pages."""
    monkeypatch.setattr(exporting, "_PAGE", 2)


@contextmanager
def armed(written: str, home: Path) -> Iterator[None]:
    home.mkdir(exist_ok=True)
    arm(written, home=home)
    try:
        yield
    finally:
        arm("", home=home)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("point", ["export.written=full@1", "export.written=full@3", "export.replaced=full@1"])
def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(
    store: Store, job: Job, tmp_path: Path, short_pages: None, form: str, point: str
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "out.jsonl"
    out.write_text("old")
    with armed(point, tmp_path / "home"), pytest.raises(BatchmillError, match=r"^cannot write .*: No space left"):
        export(store, job, out=out, form=form, only="all")
    assert out.read_text() == "old"
    assert list(folder.iterdir()) == [out]
    export(store, job, out=out, form=form, only="all")
    other = tmp_path / "other.jsonl"
    export(store, job, out=other, form=form, only="all")
    assert out.read_bytes() == other.read_bytes() != b"old"


@pytest.mark.parametrize("point", ["export.written=kill9@1", "export.replaced=kill9@1"])
def test_a_killed_export_leaves_the_old_file_and_the_next_has_the_same_bytes(
    store: Store, job: Job, tmp_path: Path, point: str
) -> None:
    out, undisturbed = tmp_path / "out.jsonl", tmp_path / "undisturbed.jsonl"
    out.write_text("old")
    export(store, job, out=undisturbed, form="jsonl", only="all")
    words = ("results", job.id, "-o", out)
    (tmp_path / "home").mkdir()
    assert command(store, *words, env={"BATCHMILL_FAILPOINT": point}).returncode == -9
    assert out.read_text() == "old"
    assert command(store, *words, env={"BATCHMILL_FAILPOINT": point}).returncode == 0
    assert out.read_bytes() == undisturbed.read_bytes()


def test_stdout_that_is_full_or_closed_is_one_clear_error(store: Store, job: Job) -> None:
    with open("/dev/full", "w") as full:
        done = command(store, "results", job.id, stdout=full)
    assert done.returncode == 1
    kept = f"; the answers are kept in job {job.id}: `batchmill results {job.id} -o FILE` writes them\n"
    assert done.stderr == f"batchmill: cannot write the answers to stdout: No space left on device{kept}"
    done = command(store, "results", job.id, through=["sh", "-c", 'exec "$@" >&-', "sh"])
    assert done.returncode == 1
    assert done.stderr == f"batchmill: cannot write the answers to stdout: it is closed{kept}"


def test_who_reads_only_the_beginning_sees_no_error(store: Store, job: Job) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = command(store, "results", job.id, stdout=write_end)
    os.close(write_end)
    assert done.stderr == ""


@pytest.mark.parametrize("form", FORMS)
def test_stdout_has_the_bytes_of_the_file_whatever_the_locale(
    store: Store, job: Job, tmp_path: Path, form: str
) -> None:
    out, out_of_stdout = tmp_path / "out", tmp_path / "stdout"
    export(store, job, out=out, form=form, only="succeeded")
    with out_of_stdout.open("wb") as file:
        words = ("results", job.id, "--format", form, "--only", "succeeded")
        assert command(store, *words, stdout=file, env={"PYTHONIOENCODING": "ascii"}).returncode == 0
    assert out_of_stdout.read_bytes() == out.read_bytes()


def test_the_file_that_a_link_leads_to_is_replaced_and_not_the_link(store: Store, job: Job, tmp_path: Path) -> None:
    elsewhere, link = tmp_path / "elsewhere.jsonl", tmp_path / "link.jsonl"
    elsewhere.write_text("old")
    link.symlink_to(elsewhere)
    export(store, job, out=link, form="jsonl", only="all")
    assert link.is_symlink()
    assert len(elsewhere.read_bytes().split(b"\n")) == 6


def test_a_pipe_is_written_to_and_not_replaced(store: Store, job: Job, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    export(store, job, out=pipe, form="jsonl", only="all")
    reader.join(10)
    assert pipe.is_fifo()
    assert len(read[0].split(b"\n")) == 6


def test_a_name_as_long_as_names_may_be(store: Store, job: Job, tmp_path: Path) -> None:
    out = tmp_path / ("\u4f60" * 85)
    assert export(store, job, out=out, form="jsonl", only="all").count == 5
    assert out.is_file()


def test_an_export_onto_a_full_disk_is_one_line_and_leaves_nothing(store: Store, small_disk: Path) -> None:
    job_id = mill.load(store, 40, batch_size=40)
    who = mill.session(store)
    (claimed,) = mill.claim(store, who)
    long = [mill.output(job_id, each.index, text="x" * 50_000) for each in claimed.requests]
    mill.save(store, who, [BatchReport(claimed.lease, outputs=long)])
    for form in FORMS:
        out = small_disk / f"out.{'csv' if form == 'csv' else 'jsonl'}"
        done = command(store, "results", job_id, "-o", out, "--format", form)
        assert done.returncode == 1
        assert done.stderr == (
            f"batchmill: cannot write {out}: No space left on device; the answers are kept in job {job_id}: "
            f"`batchmill results {job_id} -o FILE` writes them\n"
        )
        assert list(small_disk.iterdir()) == []
