"""Output files: replaced whole, and refused before any work where they would overwrite an input, by any name."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from batchmill.jobs.errors import BatchmillError, UsageError
from batchmill.jobs.runtime.files.output_file import check_target, replaced
from batchmill.jobs.store.store import Store
from batchmill.producer.files.export import errors_path, export
from tests.support.paths import ROOT
from tests.support.processes import forked
from tests.support.store import mill

DEMO = ROOT / "worker" / "demo" / "model"
PROMPTS = '{"prompt": "one"}\n{"prompt": "two"}\n'


def batchmill(folder: Path, *words: str | Path, shell: str = "", code: int = 2, **settings: str) -> str:
    """Runs batchmill in this folder, with a home in it, and returns its stderr."""
    environ = os.environ | {"BATCHMILL_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT / "src")} | settings
    if shell:
        line = ["sh", "-c", shell, "sh", sys.executable, "-m", "batchmill", *map(str, words)]
        done = subprocess.run(line, cwd=folder, env=environ, capture_output=True, text=True, timeout=120)
    else:
        done = forked.finished(words, folder=folder, env=environ)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stderr


def same(prompts: Path) -> Path:
    return prompts


def another_way(prompts: Path) -> Path:
    return prompts.parent / "." / "home" / ".." / prompts.name


def symbolic_link(prompts: Path) -> Path:
    link = prompts.parent / "link.jsonl"
    link.symlink_to(prompts.name)
    return link


def hard_link(prompts: Path) -> Path:
    link = prompts.parent / "hard.jsonl"
    link.hardlink_to(prompts)
    return link


def of_a_linked_folder(prompts: Path) -> Path:
    folder = prompts.parent / "folder"
    folder.symlink_to(prompts.parent)
    return folder / prompts.name


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    path = tmp_path / "p.jsonl"
    path.write_text(PROMPTS)
    return path


@pytest.mark.parametrize("name", [same, another_way, symbolic_link, hard_link, of_a_linked_folder])
def test_answers_are_not_written_over_the_prompts_by_any_name(prompts: Path, name: Callable[[Path], Path]) -> None:
    out = name(prompts)
    said = batchmill(prompts.parent, "run", "p.jsonl", "-m", "echo", "-o", out)
    assert f"-o {out} is the file of prompts itself; name another" in said
    assert prompts.read_text() == PROMPTS
    assert not any((prompts.parent / "home").iterdir()), "nothing was begun"


@pytest.mark.parametrize(
    ("words", "shell"),
    [
        (["-", "-o", "p.jsonl"], 'exec "$@" < p.jsonl'),
        (["/dev/stdin", "-o", "p.jsonl"], 'exec "$@" < p.jsonl'),
        (["/proc/self/fd/7", "-o", "p.jsonl"], 'exec "$@" 7< p.jsonl'),
        (["p.jsonl"], 'exec "$@" >> p.jsonl'),
        (["p.jsonl"], 'exec "$@" 1<> p.jsonl'),
        (["-"], 'exec "$@" < p.jsonl >> p.jsonl'),
        (["p.jsonl", "-o", "/dev/stdout"], 'exec "$@" >> p.jsonl'),
    ],
)
def test_streams_may_be_the_file_of_the_prompts_too(prompts: Path, words: list[str], shell: str) -> None:
    said = batchmill(prompts.parent, "run", *words, "-m", "echo", shell=shell)
    assert "is the file of prompts itself; name another" in said
    assert prompts.read_text() == PROMPTS
    assert not any((prompts.parent / "home").iterdir())


def test_the_id_of_a_submit_does_not_go_into_its_prompts(prompts: Path) -> None:
    batchmill(prompts.parent, "submit", "p.jsonl", "-m", "echo", shell='exec "$@" >> p.jsonl')
    assert prompts.read_text() == PROMPTS


@pytest.mark.parametrize("out", ["home/batchmill.db-wal", "home/../home/redis.sock", "./batchmill.toml"])
def test_answers_do_not_take_the_place_of_what_batchmill_lives_by(prompts: Path, out: str) -> None:
    for words in (["run", "p.jsonl", "-m", "echo"], ["results", "last"]):
        assert "would be written over" in batchmill(prompts.parent, *words, "-o", out)
    assert not (prompts.parent / out).exists()


@pytest.mark.parametrize(
    "out", ["home/batchmill.db", "home/batchmill.db-wal", "home/batchmill.db-line", "home/mill.lock", "batchmill.toml"]
)
def test_answers_are_not_written_over_what_batchmill_lives_by(prompts: Path, out: str) -> None:
    kept = prompts.parent / out
    kept.write_bytes(b"")
    for words in (["run", "p.jsonl", "-m", "echo"], ["results", "last"]):
        assert "would be written over" in batchmill(prompts.parent, *words, "-o", out)
    assert kept.read_bytes() == b""


def test_answers_are_not_written_over_a_database_named_by_its_url(prompts: Path) -> None:
    database = prompts.parent / "mill.db"
    url = {"BATCHMILL_DATABASE_URL": f"sqlite:///{database}"}
    batchmill(prompts.parent, "db", "upgrade", code=0, **url)
    assert "would be written over" in batchmill(prompts.parent, "results", "-o", "mill.db", **url)
    assert database.read_bytes().startswith(b"SQLite format 3")


def test_answers_are_not_written_over_the_model(prompts: Path) -> None:
    model = prompts.parent / "model"
    shutil.copytree(DEMO, model)
    for name in ("model.safetensors", "config.json", "chat_template.jinja"):
        said = batchmill(prompts.parent, "run", "p.jsonl", "-m", "./model", "-o", f"model/{name}")
        assert "would be written over" in said
        assert (model / name).read_bytes() == (DEMO / name).read_bytes()
    check_target(model / "answers.jsonl", keep=[])


def test_a_chart_is_not_written_over_the_data(tmp_path: Path) -> None:
    data = tmp_path / "data.png"
    data.write_text(PROMPTS)
    said = batchmill(tmp_path, "evaluate", "demo", "--data", "data.png", "-o", "data.png")
    assert "would be written over data.png" in said
    assert data.read_text() == PROMPTS


@pytest.mark.parametrize("out", ["model", "model/copy", "model/a/b"])
def test_a_quantized_copy_does_not_lie_in_its_model(tmp_path: Path, out: str) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    batchmill(tmp_path, "models", "quantize", "./model", out, "-q", "nf4")
    assert sorted(tmp_path.rglob("*")) == before


def test_results_do_not_follow_the_jobs_own_prompts(prompts: Path) -> None:
    batchmill(prompts.parent, "submit", "p.jsonl", "-m", "echo", code=0)
    batchmill(prompts.parent, "cancel", "last", code=0)
    said = batchmill(prompts.parent, "results", "last", shell='exec "$@" >> p.jsonl')
    assert "stdout holds the prompts of job " in said
    assert prompts.read_text() == PROMPTS


def test_results_do_not_replace_the_jobs_own_prompts(sqlite_url: str, tmp_path: Path) -> None:
    store = Store(sqlite_url)
    job_id = mill.begin(store)
    store.creation.add(job_id, prompts=mill.prompts(2), batch_size=4, lease_seconds=60)
    sha256 = hashlib.sha256(PROMPTS.encode()).hexdigest()
    store.creation.open(job_id, spec=mill.ECHO_SPEC, file_sha256=sha256, fingerprint="", lease_seconds=60)
    store.closing.cancel(job_id)
    out = tmp_path / "answers.jsonl"
    for form, prompts in (("jsonl", out), ("openai", out), ("openai", errors_path(out)), ("csv", out)):
        prompts.write_text(PROMPTS)
        with pytest.raises(UsageError, match=f"holds the prompts of job {job_id}"):
            export(store, store.jobs.job(job_id), out=out, form=form, only="all")
        assert prompts.read_text() == PROMPTS
        prompts.write_text("another file")
        export(store, store.jobs.job(job_id), out=out, form=form, only="all")
        assert prompts.read_text() != "another file"
        prompts.unlink()


# --- what cannot be written ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("nodir/x.jsonl", "there is no folder"),
        ("p.jsonl/x.jsonl", "there is no folder"),
        ("lost.jsonl", "there is no folder"),
        ("folder", "is a folder"),
        ("kept.jsonl", "is read-only"),
        ("socket", "is a socket"),
        ("n" * 300, "name too long"),
        ("loop", "symbolic links"),
        ("/proc/x.jsonl", "takes no file"),
    ],
)
def test_what_cannot_be_written_is_told_before_any_work(prompts: Path, out: str, said: str) -> None:
    folder = prompts.parent
    (folder / "folder").mkdir()
    (folder / "kept.jsonl").touch(mode=0o444)
    (folder / "lost.jsonl").symlink_to("nodir/x.jsonl")
    (folder / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as unix:
        os.chdir(folder)  # the path of a socket is short
        unix.bind("socket")
    for words in (["run", "p.jsonl", "-m", "echo"], ["results"]):
        assert said in (told := batchmill(folder, *words, "-o", out).casefold()), told
    assert not (folder / "nodir").exists()
    assert not (folder / "home" / "batchmill.db").exists()
    assert (folder / "kept.jsonl").read_bytes() == b""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_told_before(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="takes no file"):
        check_target(tmp_path / "x.jsonl", keep=[])
    tmp_path.chmod(0o700)


def test_what_is_no_file_may_be_written_to_even_where_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for each in (Path("/dev/null"), tmp_path / "pipe"):
        check_target(each, keep=[each])


def test_a_check_leaves_nothing_and_touches_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    check_target(out, keep=[tmp_path / "none"])
    assert not any(tmp_path.iterdir())
    out.write_text("old")
    before = out.stat()
    check_target(out, keep=[tmp_path / "none"])
    assert (out.read_text(), out.stat()) == ("old", before)


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives files to others")
def test_a_replaced_file_stays_its_owners(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.touch(mode=0o640)
    os.chown(out, 4711, 4712)
    with replaced(out) as file:
        file.write("new")
    status = out.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (4711, 4712, 0o640)


def test_a_folder_that_goes_away_meanwhile_costs_no_answer(sqlite_url: str, tmp_path: Path) -> None:
    store = Store(sqlite_url)
    job_id = mill.load(store, 3)
    store.closing.cancel(job_id)
    again = rf"cannot write .*; the answers are kept in job {job_id}: `batchmill results {job_id} -o FILE` writes them"
    for out in (tmp_path / "gone" / "x.jsonl", Path("/dev/full")):
        with pytest.raises(BatchmillError, match=again):
            export(store, store.jobs.job(job_id), out=out, form="jsonl", only="all")


def test_a_failed_export_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    with pytest.raises(UnicodeEncodeError), replaced(out) as file:
        file.write("half of the new one, then what cannot be written: \ud800")
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_replaced_file_keeps_its_mode_and_a_new_one_is_readable(tmp_path: Path) -> None:
    kept, new = tmp_path / "kept", tmp_path / "new"
    kept.touch(mode=0o640)
    kept.chmod(0o640)
    for out in (kept, new):
        with replaced(out) as file:
            file.write("x")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o640
    assert stat.S_IMODE(new.stat().st_mode) & 0o044


def test_a_folder_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BatchmillError, match="cannot write"), replaced(tmp_path / "none" / "out"):
        pass
