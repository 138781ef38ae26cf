"""From a prompt file to a queued job: stored rows, refused files, and the view of others meanwhile."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.errors import LoadingLost, PromptFileError, UsageError
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.requests.generation import GenerationOptions, SamplingParams
from batchmill.jobs.requests.states import JobState
from batchmill.jobs.runtime.logs import configure_logs
from batchmill.jobs.store.store import Store
from batchmill.producer import submit as submit_module
from batchmill.producer.submission import Submission
from batchmill.producer.submit import load_job
from tests.support.store import mill

B = Adapter("sql", "/b")
SETTINGS = load_settings()  # read before any test changes the environment


@pytest.fixture
def sqlite_store(sqlite_url: str) -> Iterator[Store]:
    store = Store(sqlite_url)
    yield store
    store.close()


def write(path: Path, *lines: object) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_job_keeps_its_provenance_and_options(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "x"}, {"prompt": "y"})
    options = GenerationOptions("be brief", SamplingParams(max_tokens=5))
    submission = Submission(path, "echo", name="n", options=options, batch_size=1, command="batchmill submit p.jsonl")
    job_id, spec = load_job(submission, store=store, settings=SETTINGS)
    job = store.jobs.job(job_id)
    assert job.state is JobState.QUEUED
    assert (job.name, job.file_name, job.command) == ("n", "p.jsonl", "batchmill submit p.jsonl")
    assert len(job.file_sha256) == 64
    assert job.options == {"system": "be brief", "max_tokens": 5}
    assert job.counts.total == 2
    assert mill.rows(store, "batches") == 2
    assert store.jobs.resumable(submission.fingerprint(spec, job.file_sha256)) == [job]


def test_a_line_may_be_as_long_as_the_setting_says(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "x" * 100})
    short = load_settings(max_line_bytes=100)
    with pytest.raises(PromptFileError) as caught:
        load_job(Submission(path, "echo"), store=store, settings=short)
    said = f"{path}:1: longer than 100 bytes; raise the setting max_line_bytes to allow it"
    assert caught.value.problems == (said,)
    assert load_job(Submission(path, "echo"), store=store, settings=SETTINGS)


def test_declared_adapters_are_part_of_the_job(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs(level=SETTINGS.log_level, form=SETTINGS.log_format)
    path = write(tmp_path / "p.jsonl", {"prompt": "x", "adapter": "sql"}, {"prompt": "y"})
    submission = Submission(path, "echo", options=GenerationOptions(adapters=("sql", "unused")))
    job_id, spec = load_job(submission, store=store, settings=SETTINGS)
    job = store.jobs.job(job_id)
    assert (job.options, job.adapters) == ({"adapters": ["sql", "unused"]}, ())
    assert mill.rows(store, "batches") == 2
    said = capsys.readouterr().err
    assert "unused" in said
    assert "sql" not in said
    plain = Submission(path, "echo", options=GenerationOptions(adapters=("sql",)))
    meant = replace(plain, adapters=(Adapter("sql", "/a"),))
    prints = {each.fingerprint(spec, "0") for each in (submission, plain, meant, replace(meant, adapters=(B,)))}
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("path", "model", "said"),
    [
        ("p.jsonl", "sql", "is also the name of the model"),
        ("p.txt", "echo", '{"prompt": "...", "adapter": "sql"}'),
    ],
)
def test_adapters_that_no_line_could_name_are_refused(path: str, model: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        Submission(path, model, options=GenerationOptions(adapters=("sql",)))
    assert said in str(refused.value)


def test_a_bad_file_leaves_nothing_and_names_duplicates_of_every_page(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit_module, "MAX_REQUESTS", 2)
    ids = ["a", "b", "a", "c", "b", "b"]
    lines: list[object] = [{"prompt": "x", "custom_id": each} for each in ids]
    path = write(tmp_path / "p.jsonl", *lines, {"prompt": 1})
    with pytest.raises(PromptFileError) as refused:
        load_job(Submission(path, "echo"), store=store, settings=SETTINGS)
    assert refused.value.problems == (
        f"{path}:3: duplicate custom_id 'a', first used at index 0",
        f"{path}:5: duplicate custom_id 'b', first used at index 1",
        f"{path}:6: duplicate custom_id 'b', first used at index 1",
        f"{path}:7: prompt must be a string, not a number",
    )
    assert refused.value.count == 4
    for table in ("jobs", "batches", "requests"):
        assert mill.rows(store, table) == 0


def test_an_interrupted_submit_leaves_nothing(
    sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "x"})

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sqlite_store.creation, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_job(Submission(path, "echo"), store=sqlite_store, settings=SETTINGS)
    assert mill.rows(sqlite_store, "jobs") == 0


def test_the_files_one_model_is_used_without_a_flag(sqlite_store: Store, tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", {"prompt": "x"}, {"prompt": "x", "model": "echo"})
    none = write(tmp_path / "none.jsonl", {"prompt": "x"})
    two = write(tmp_path / "two.jsonl", {"prompt": "x", "model": "echo"}, {"prompt": "x", "model": "demo"})
    assert load_job(Submission(one), store=sqlite_store, settings=SETTINGS)[1].model == "echo"
    with pytest.raises(UsageError, match="-m"):
        load_job(Submission(none), store=sqlite_store, settings=SETTINGS)
    with pytest.raises(PromptFileError):
        load_job(Submission(two), store=sqlite_store, settings=SETTINGS)
    kept = load_job(Submission(two, "echo", ignore_line_model=True), store=sqlite_store, settings=SETTINGS)
    assert kept[1].model == "echo"
    assert mill.rows(sqlite_store, "jobs") == 2


def test_a_folder_that_holds_no_model_is_refused_before_anything_is_said_of_its_chat_template(
    sqlite_store: Store, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    message = {"messages": [{"role": "user", "content": "x"}]}
    chat, named = write(tmp_path / "chat.jsonl", message), write(tmp_path / "n.jsonl", message | {"model": str(model)})
    for submission in (Submission(chat, str(model)), Submission(named)):
        with pytest.raises(UsageError, match=r"model is no model: it holds no config\.json; name the folder"):
            load_job(submission, store=sqlite_store, settings=SETTINGS)
    (model / "adapter_config.json").touch()
    with pytest.raises(UsageError, match="it is an adapter: serve it with --adapter"):
        load_job(Submission(chat, str(model)), store=sqlite_store, settings=SETTINGS)
    assert mill.rows(sqlite_store, "jobs") == 0


def test_messages_for_a_folder_without_a_chat_template_are_refused(sqlite_store: Store, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer_config.json").write_text("{}")
    chat = write(tmp_path / "chat.jsonl", {"prompt": "x"}, {"messages": [{"role": "user", "content": "x"}]})
    plain = write(tmp_path / "plain.jsonl", {"prompt": "x"})
    with pytest.raises(UsageError, match=r"line 2 has messages.*chat_template"):
        load_job(Submission(chat, str(model)), store=sqlite_store, settings=SETTINGS)
    submission = Submission(plain, str(model), options=GenerationOptions("be brief"))
    with pytest.raises(UsageError, match="--system"):
        load_job(submission, store=sqlite_store, settings=SETTINGS)
    submission = Submission(
        plain, str(model), options=GenerationOptions(chat_template_kwargs={"enable_thinking": False})
    )
    with pytest.raises(UsageError, match="--chat-template-kwargs is for a chat template"):
        load_job(submission, store=sqlite_store, settings=SETTINGS)
    load_job(Submission(plain, str(model)), store=sqlite_store, settings=SETTINGS)
    for name, text in (("chat_template.jinja", "x"), ("tokenizer_config.json", '{"chat_template": "x"}')):
        before = (model / name).read_text() if (model / name).exists() else None
        (model / name).write_text(text)
        load_job(Submission(chat, str(model)), store=sqlite_store, settings=SETTINGS)
        (model / name).unlink() if before is None else (model / name).write_text(before)


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """Writes to standard input, a pipe that stays open until an empty write."""
    read_end, write_end = os.pipe()
    stdin = io.TextIOWrapper(os.fdopen(read_end, "rb"))
    monkeypatch.setattr(sys, "stdin", stdin)

    def feed(data: bytes) -> None:
        if data:
            os.write(write_end, data)
        else:
            os.close(write_end)

    yield feed
    stdin.close()


@pytest.mark.parametrize("lease_seconds", [0.4, 3_600.0], ids=["short", "longer than a reconciler expects"])
def test_the_loading_lease_is_renewed_while_stdin_is_silent(
    sqlite_store: Store, monkeypatch: pytest.MonkeyPatch, feed: Callable[[bytes], None], lease_seconds: float
) -> None:
    settings = load_settings(loading_lease_seconds=lease_seconds)
    monkeypatch.setattr(submit_module, "_RENEWAL_SECONDS", 0.1)
    renewals = []
    real = sqlite_store.creation.renew

    def renew(job_id: str, *, lease_seconds: float) -> None:
        real(job_id, lease_seconds=lease_seconds)
        renewals.append(sqlite_store.creation.expired(lease_seconds=lease_seconds))
        if len(renewals) == 8:  # twice the short lease's length
            feed(b'{"prompt": "late"}\n')
            feed(b"")

    monkeypatch.setattr(sqlite_store.creation, "renew", renew)
    job_id, _ = load_job(Submission("-", "echo"), store=sqlite_store, settings=settings)
    assert sqlite_store.jobs.job(job_id).counts.total == 1
    assert renewals == [{}] * len(renewals)


def test_a_submit_that_lost_its_lease_says_so(
    sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "x"})
    real = sqlite_store.creation.add

    def deleted_by_others(job_id: str, **kwargs: object) -> object:
        sqlite_store.creation.discard(job_id)
        return real(job_id, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(sqlite_store.creation, "add", deleted_by_others)
    with pytest.raises(LoadingLost, match="submit it again"):
        load_job(Submission(path, "echo"), store=sqlite_store, settings=SETTINGS)


def test_a_reader_and_a_writer_get_through_during_a_submit(sqlite_url: str, tmp_path: Path) -> None:
    """Nobody waits longer than one short transaction of the submit, which is a small part of it."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "%s"}\n' % ("x" * 400) * 100_000)
    over = threading.Event()
    longest = {"read": 0.0, "write": 0.0}
    times = {"read": 0, "write": 0}

    def watch(kind: str, work: Callable[[Store], object]) -> None:
        own = Store(sqlite_url)
        while not over.is_set():
            begin = monotonic()
            work(own)
            longest[kind] = max(longest[kind], monotonic() - begin)
            times[kind] += 1
            over.wait(0.005)
        own.close()

    store = Store(sqlite_url)
    who = mill.session(store)
    watchers = [
        threading.Thread(target=watch, args=("read", lambda own: own.jobs.jobs(most=5))),
        threading.Thread(target=watch, args=("write", lambda own: own.registration.heartbeat(who.worker_id, beat=5))),
    ]
    for watcher in watchers:
        watcher.start()
    begin = monotonic()
    load_job(Submission(str(path), "echo"), store=store, settings=SETTINGS)
    seconds = monotonic() - begin
    over.set()
    for watcher in watchers:
        watcher.join()
    store.close()
    assert min(times.values()) >= 5
    assert max(longest.values()) < seconds / 2, (longest, seconds)
