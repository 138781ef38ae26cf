"""One job for each idempotency key: with repeated, concurrent and interrupted submits."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.errors import KeyTaken, PromptFileError, UsageError
from batchmill.jobs.requests.generation import GenerationOptions, SamplingParams
from batchmill.jobs.requests.states import JobState
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import jobs
from batchmill.producer.files.prompt_file import PromptFile
from batchmill.producer.submission import Submission
from batchmill.producer.submit import Submitted, load_job, load_once
from tests.integration.conftest import TIMERS, Mill, until
from tests.support.paths import ROOT
from tests.support.store import mill
from tests.support.whole_files import counted

SETTINGS = load_settings()  # read before any test changes the environment
AT_ONCE = 20
LINES = b"".join(b'{"prompt": "prompt %d"}\n' % index for index in range(5))


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "p.jsonl"
    path.write_bytes(LINES)
    return str(path)


@pytest.fixture
def from_stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Every reader of stdin gets these bytes, several at once too."""

    def set_stdin(data: bytes) -> None:
        monkeypatch.setattr(PromptFile, "_standard_input", lambda _: io.BytesIO(data))

    return set_stdin


def submit(store: Store, submission: Submission) -> Submitted:
    return load_once(submission, store=store, settings=SETTINGS)


# --- at once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [{"idempotency_key": "nightly"}, {"once": True}], ids=["key", "once"])
@pytest.mark.parametrize("source", ["file", "stdin"])
def test_twenty_submits_at_once_make_one_job(
    store: Store, store_url: str, file: str, from_stdin: Callable[[bytes], None], source: str, key: dict[str, Any]
) -> None:
    from_stdin(LINES)
    submission = Submission(file if source == "file" else "-", "echo", batch_size=2, **key)
    together = threading.Barrier(AT_ONCE)

    def one(_: int) -> Submitted:
        own = Store(store_url, busy_seconds=30)
        opened = own.creation.open

        def open_together(job_id: str, **values: Any) -> None:
            together.wait(60)  # every file is stored by now, and no job is open
            opened(job_id, **values)

        own.creation.open = open_together  # type: ignore[method-assign]
        try:
            return submit(own, submission)
        finally:
            own.close()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        submitted = list(pool.map(one, range(AT_ONCE)))
    assert len({each.job_id for each in submitted}) == 1
    assert sum(each.is_new for each in submitted) == 1
    assert {each.spec for each in submitted} == {mill.ECHO_SPEC}
    assert counted(store) == (1, 3, 5)
    assert store.jobs.job(submitted[0].job_id).state is JobState.QUEUED


@pytest.mark.slow
@pytest.mark.parametrize(("source", "flags"), [("file", ["--idempotency-key", "nightly"]), ("stdin", ["--once"])])
def test_twenty_commands_at_once_print_one_id(
    store: Store, store_url: str, file: str, source: str, flags: list[str]
) -> None:
    words = [sys.executable, "-m", "batchmill", "submit", file if source == "file" else "-", "-m", "echo", *flags]
    environ = os.environ | {"BATCHMILL_DATABASE_URL": store_url, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ)
        for _ in range(AT_ONCE)
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        said = list(pool.map(lambda each: each.communicate(LINES if source == "stdin" else None, 120), started))
    assert {each.returncode for each in started} == {0}, said
    assert len({stdout for stdout, _ in said}) == 1
    assert sum(b"was submitted before" not in stderr for _, stderr in said) == 1
    assert counted(store) == (1, 1, 5)


def test_who_waits_for_a_submit_that_fails_in_the_end_wins(store: Store, store_url: str, file: str) -> None:
    """The key belongs to whoever commits it, and not to whoever wrote it first."""
    first = mill.begin(store)
    found: list[Submitted] = []
    other = Store(store_url, busy_seconds=30)
    late = threading.Thread(target=lambda: found.append(submit(other, Submission(file, "echo", idempotency_key="k"))))

    class Died(Exception):
        pass

    def write_the_key_and_die() -> None:
        with store.database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == first).values(idempotency_key="k"))
            late.start()
            late.join(0.3)
            assert not found
            raise Died

    with pytest.raises(Died):
        write_the_key_and_die()
    late.join(30)
    other.close()
    store.creation.discard(first)
    assert [each.is_new for each in found] == [True]
    assert counted(store) == (1, 1, 5)


# --- again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [{"idempotency_key": "k" * 256}, {"once": True}], ids=["key", "once"])
def test_a_second_submit_of_a_file_finds_the_job_and_writes_nothing(
    store: Store, file: str, monkeypatch: pytest.MonkeyPatch, key: dict[str, Any]
) -> None:
    submission = Submission(file, "echo", **key)
    first = submit(store, submission)

    def begin(**_: object) -> str:
        raise AssertionError("it was stored again")

    monkeypatch.setattr(store.creation, "begin", begin)
    again = submit(store, replace(submission, name="other", batch_size=1, command="other"))
    assert (first.is_new, again.is_new) == (True, False)
    assert again[:2] == first[:2]


def test_a_stream_finds_the_job_of_a_file(store: Store, file: str, from_stdin: Callable[[bytes], None]) -> None:
    first = submit(store, Submission(file, "echo", once=True))
    from_stdin(LINES)
    assert submit(store, Submission("-", "echo", once=True)) == (*first[:2], False)
    assert counted(store) == (1, 1, 5)


def test_the_model_that_the_file_names_is_the_model_of_the_flag(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x", "model": "echo"}\n')
    first = submit(store, Submission(str(path), once=True))
    assert submit(store, Submission(str(path), once=True)) == (*first[:2], False)
    assert submit(store, Submission(str(path), "echo", once=True)) == (*first[:2], False)


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_the_same_key_with_other_content_is_refused(
    store: Store, file: str, tmp_path: Path, from_stdin: Callable[[bytes], None], source: str
) -> None:
    submission = Submission(file, "echo", idempotency_key="nightly")
    first = submit(store, submission)
    if source == "stdin":
        submission = replace(submission, path="-")
    other_options = replace(submission, options=GenerationOptions(None, SamplingParams(max_tokens=5)))
    other_model = replace(submission, model="demo")
    from_stdin(LINES)
    for other in (other_options, other_model):
        with pytest.raises(KeyTaken, match=rf"job {first.job_id} .*'nightly' with another.*choose another key"):
            submit(store, other)
    from_stdin(LINES + LINES)
    Path(file).write_bytes(LINES + LINES)
    with pytest.raises(UsageError) as refused:
        submit(store, submission)
    assert refused.value.exit_code == 2
    assert counted(store) == (1, 1, 5)


def test_once_tells_jobs_apart_by_what_they_ask(store: Store, file: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(LINES)
    submission = Submission(file, "echo", once=True)
    different = [
        submission,
        replace(submission, model="demo"),
        replace(submission, model="demo", quantization="int8"),
        replace(submission, options=GenerationOptions("be brief")),
        replace(submission, options=GenerationOptions(None, SamplingParams(seed=1))),
        replace(submission, form="text"),  # the same bytes, and other prompts
    ]
    submitted = [submit(store, each) for each in different]
    assert all(each.is_new for each in submitted)
    assert len({each.job_id for each in submitted}) == len(different)
    assert submit(store, replace(submission, path=str(copy))) == (*submitted[0][:2], False)


def test_jobs_without_a_key_are_as_many_as_were_submitted(store: Store, file: str) -> None:
    submission = Submission(file, "echo")
    assert len({submit(store, each).job_id for each in (submission, submission, replace(submission, once=True))}) == 3


def test_a_key_is_kept_apart_from_every_other_spelling(store: Store, file: str) -> None:
    keys = ["a", "A", "a ", " a", "\xe9", "e\u0301", "'; DROP TABLE jobs; --", "%", "\U0001f600" * 256]
    submitted = [submit(store, Submission(file, "echo", idempotency_key=key)) for key in keys]
    assert all(each.is_new for each in submitted)
    for key, first in zip(keys, submitted, strict=True):
        assert submit(store, Submission(file, "echo", idempotency_key=key)).job_id == first.job_id


@pytest.mark.parametrize("key", ["", "k" * 257, "a\nb", "a\0", "\x1b[2J", "\udcff", "\u202e", "once:", "once:abc"])
def test_a_key_that_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match="--idempotency-key takes 1 to 256 printable characters"):
        Submission("p.jsonl", idempotency_key=key)


def test_once_and_a_key_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="--once"):
        Submission("p.jsonl", idempotency_key="k", once=True)


# --- what fails, dies or is cancelled on the way ------------------------------------------------------------


def test_a_submit_that_failed_leaves_its_key_free(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(LINES + b"bad\n")
    submission = Submission(str(path), "echo", idempotency_key="k")
    with pytest.raises(PromptFileError):
        submit(store, submission)
    assert counted(store) == (0, 0, 0)
    path.write_bytes(LINES)
    assert submit(store, submission).is_new


def test_a_cancelled_job_keeps_its_key(store: Store, file: str) -> None:
    submission = Submission(file, "echo", once=True)
    first = submit(store, submission)
    store.closing.cancel(first.job_id)
    again = submit(store, submission)
    assert again == (*first[:2], False)
    assert store.jobs.job(again.job_id).state is JobState.CANCELLED


def test_the_loser_alone_deletes_its_rows(store: Store, file: str) -> None:
    """load_job itself names the winner, and leaves it and every other loading job as they are."""
    loading = mill.begin(store)
    submission = Submission(file, "echo", idempotency_key="k")
    winner, _ = load_job(submission, store=store, settings=SETTINGS)
    with pytest.raises(KeyTaken) as taken:
        load_job(submission, store=store, settings=SETTINGS)
    assert (taken.value.job_id, taken.value.is_same) == (winner, True)
    assert counted(store) == (2, 1, 5)
    store.creation.discard(winner)  # opened, so out of reach
    store.creation.discard(loading)
    assert counted(store) == (1, 1, 5)


def test_a_failed_clean_up_does_not_hide_why_the_submit_failed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from batchmill.jobs.errors import StoreFull

    path = tmp_path / "p.jsonl"
    path.write_bytes(b"{bad\n")

    def full(_: str) -> None:
        raise StoreFull("no space left")

    monkeypatch.setattr(store.creation, "discard", full)
    with pytest.raises(PromptFileError):
        submit(store, Submission(str(path), "echo"))


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def a_mill(sqlite_template: Path, tmp_path: Path) -> Iterator[Mill]:
    home = tmp_path / "home"
    home.mkdir()
    (home / "batchmill.db").write_bytes(sqlite_template.read_bytes())
    started = Mill(home, load_settings(home=home, **TIMERS))
    started.redis.start()
    yield started
    started.end()


def test_a_crash_between_commit_and_send_needs_no_second_submit(a_mill: Mill, file: str) -> None:
    words = ["submit", file, "-m", "echo", "--idempotency-key", "nightly"]
    worker = a_mill.start("worker", "-m", "echo")
    until(lambda: any(each.state == "ready" for each in a_mill.store.workers.rows()), "the worker is ready")
    killed = a_mill.finished(*words, failpoint="submit.opened=kill9@1")
    assert (killed.returncode, killed.stdout) == (-9, "")
    job_id = a_mill.store.jobs.find("last")
    until(lambda: a_mill.store.jobs.job(job_id).closed, "the job is worked off without a wake-up of its submit")
    assert worker.poll() is None
    again = a_mill.finished(*words, "--wait", failpoint="submit.opened=kill9@1")
    assert (again.returncode, again.stdout) == (0, f"{job_id}\n")
    assert f"this was submitted before: job {job_id} is completed\n" in again.stderr
    assert [each["text"] for each in a_mill.results(job_id)] == [f"prompt {index}" for index in range(5)]
    assert mill.rows(a_mill.store, "jobs") == 1


def test_a_crash_while_loading_leaves_a_key_to_the_next_submit(a_mill: Mill, file: str) -> None:
    words = ["submit", "-", "-m", "echo", "--once"]
    killed = a_mill.finished(*words, stdin=LINES.decode(), failpoint="submit.page=kill9@1")
    assert killed.returncode == -9
    assert json.loads(a_mill.command("jobs", "--json")) == []
    job_id = a_mill.command(*words, stdin=LINES.decode(), loading_lease_seconds=0.1).strip()
    assert a_mill.command(*words, stdin=LINES.decode()).strip() == job_id
    assert a_mill.command("submit", file, "-m", "echo", "--once").strip() == job_id


def test_the_command_says_that_the_job_was_cancelled_and_that_the_key_is_anothers(a_mill: Mill, file: str) -> None:
    words = ["submit", file, "-m", "echo", "--idempotency-key", "k"]
    job_id = a_mill.command(*words).strip()
    a_mill.command("cancel", job_id)
    again = a_mill.finished(*words, "--wait")
    assert (again.returncode, again.stdout) == (5, f"{job_id}\n")
    assert f"job {job_id} is cancelled" in again.stderr.splitlines()[0]
    assert "no live worker" not in again.stderr
    refused = a_mill.finished(*words, "--seed", "1")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert len(refused.stderr.splitlines()) == 1
    for wrong in (["--once"], ["--idempotency-key", "once:x"]):
        assert "--idempotency-key" in a_mill.finished(*words, *wrong).stderr
