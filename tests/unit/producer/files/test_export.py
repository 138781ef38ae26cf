"""Files that an export writes: JSONL, the OpenAI Batch format, CSV, and files that are replaced whole."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import update

from batchmill.jobs.errors import BatchmillError
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.requests.generation import Choice, GenerationRequest
from batchmill.jobs.requests.request import ErrorCode, Output, RequestKey, Timings
from batchmill.jobs.requests.states import RequestState
from batchmill.jobs.runtime.failpoints import arm
from batchmill.jobs.runtime.files.output_file import replaced
from batchmill.jobs.store import tables
from batchmill.jobs.store.leases.lease import BatchReport
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.jobs import Job, OutputRow
from batchmill.producer.cli.jobs import results
from batchmill.producer.files import export as exporting
from batchmill.producer.files.export import errors_path, export
from batchmill.producer.requests.result_lines import csv_columns, openai_line
from tests.support.paths import ROOT
from tests.support.store import mill

FORMS = ["jsonl", "openai", "csv"]
PASSED = {"user": "u", "metadata": {"a": "b"}}
REQUESTS = [
    GenerationRequest(0, "chat", messages=({"role": "user", "content": "hi"},), passthrough=PASSED),
    GenerationRequest(1, "plain", prompt='it says "messages": here'),
    GenerationRequest(2, "too long", prompt="x"),
    GenerationRequest(3, "no memory", prompt="x"),
    GenerationRequest(4, "left", prompt="x"),
]


@pytest.fixture
def store(sqlite_url: str) -> Store:
    return Store(sqlite_url)


@pytest.fixture
def job(store: Store) -> Job:
    """A cancelled job with an output of every kind."""
    job_id = mill.begin(store, batch_size=4)
    store.creation.add(job_id, prompts=REQUESTS, batch_size=4, lease_seconds=60)
    store.creation.open(job_id, spec=mill.ECHO_SPEC, file_sha256="", fingerprint="", lease_seconds=60)
    who = mill.session(store)
    (claimed,) = mill.claim(store, who)
    outputs = [
        Output(RequestKey(job_id, 0), (Choice("hello\u2028ü", "stop"),), 3, 4),
        Output(RequestKey(job_id, 1), (Choice('a,"b"\nc', "length"),), 5, 6),
        Output.failed(RequestKey(job_id, 2), ErrorCode.CONTEXT_LENGTH_EXCEEDED, "too long", prompt_tokens=9),
        Output.failed(RequestKey(job_id, 3), ErrorCode.OUT_OF_MEMORY, "no memory"),
    ]
    mill.save(store, who, [BatchReport(claimed.lease, outputs=outputs)])
    store.closing.cancel(job_id)
    return store.jobs.job(job_id)


def test_jsonl_has_the_documented_keys_and_what_was_passed_through(store: Store, job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert export(store, job, out=out, form="jsonl", only="all").count == 5
    lines = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    assert lines[0] == {
        "index": 0,
        "custom_id": "chat",
        "text": "hello\u2028ü",
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "error": None,
        "user": "u",
        "metadata": {"a": "b"},
    }
    assert lines[2] == {
        "index": 2,
        "custom_id": "too long",
        "text": None,
        "finish_reason": None,
        "prompt_tokens": 9,
        "completion_tokens": 0,
        "error": {"code": "context_length_exceeded", "message": "too long"},
    }
    assert lines[4]["error"]["code"] == "cancelled"


@pytest.mark.parametrize("form", ["jsonl", "openai", "csv"])
def test_what_was_once_stored_as_no_number_is_exported_as_strict_json(
    store: Store, job: Job, tmp_path: Path, form: str
) -> None:
    kept = (
        '[{"text":"x","finish_reason":"stop","logprobs":{"content":[{"token":"x","logprob":NaN,"top_logprobs":[]}]}}]'
    )
    with store.database.write() as connection:
        connection.execute(update(tables.outputs).where(tables.outputs.c.state == "succeeded").values(payload=kept))
    out = tmp_path / f"out.{form}"
    export(store, job, out=out, form=form, only="succeeded")
    text = out.read_text()
    assert "NaN" not in text
    if form != "csv":
        lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
        assert len(lines) == 2
        assert '"logprob": null' in json.dumps(lines[0])


@pytest.mark.parametrize(("only", "indexes"), [("all", [0, 1, 2, 3, 4]), ("succeeded", [0, 1]), ("failed", [2, 3, 4])])
def test_only_some_outputs_on_request(
    store: Store, job: Job, only: str, indexes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    export(store, job, out=None, form="jsonl", only=only)
    assert [json.loads(line)["index"] for line in capsys.readouterr().out.split("\n")[:-1]] == indexes


@pytest.mark.parametrize("code", [each for each in ErrorCode if each is not ErrorCode.CANCELLED])
def test_what_a_user_can_mend_has_status_400_in_the_openai_format(store: Store, job: Job, code: ErrorCode) -> None:
    ours = code in (ErrorCode.OUT_OF_MEMORY, ErrorCode.NOT_A_NUMBER, ErrorCode.ENGINE_ERROR)
    row = OutputRow(0, "a", "{}", RequestState.FAILED, "[]", 0, 0, code, "why", 0.0, None, None, None)
    response = openai_line(row, job)["response"]
    kind = "server_error" if ours else "invalid_request_error"
    assert (response["status_code"], response["body"]["error"]["type"]) == (500 if ours else 400, kind)


@pytest.mark.parametrize(
    ("only", "said"),
    [
        ("all", "wrote 2 of 5 outputs to a.jsonl, 3 to a.errors.jsonl"),
        ("failed", "wrote 0 of 5 outputs to a.jsonl, 3 to a.errors.jsonl"),
        ("succeeded", "wrote 2 of 5 outputs to a.jsonl; a.errors.jsonl is empty: none of them failed"),
    ],
)
def test_what_went_to_which_file_is_said(
    sqlite_url: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: str, said: str
) -> None:
    monkeypatch.setenv("BATCHMILL_DATABASE_URL", sqlite_url)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(results, [job.id, "--format", "openai", "-o", "a.jsonl", "--only", only])
    assert done.stderr == f"{said}\n"
    assert bool(Path("a.errors.jsonl").read_bytes()) == (only != "succeeded")
    done = CliRunner().invoke(results, [job.id, "-o", "b.jsonl"])
    assert done.stderr == "wrote 5 of 5 outputs to b.jsonl\n"


def test_the_openai_format_line_by_line(store: Store, job: Job, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    export(store, job, out=out, form="openai", only="all")
    good = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    bad = [json.loads(line) for line in errors_path(out).read_bytes().split(b"\n")[:-1]]
    assert errors_path(out).name == "answers.errors.jsonl"
    chat, plain = good
    body = chat["response"].pop("body")
    assert chat == {
        "id": chat["id"],
        "custom_id": "chat",
        "response": {"status_code": 200, "request_id": chat["response"]["request_id"]},
        "error": None,
    }
    assert chat["id"].startswith("batch_req_")
    assert isinstance(body.pop("created"), int)
    assert body.pop("id").startswith("chatcmpl-")
    assert body == {
        "object": "chat.completion",
        "model": "echo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello\u2028ü", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
        "system_fingerprint": None,
        "user": "u",
        "metadata": {"a": "b"},
    }
    assert plain["response"]["body"]["object"] == "text_completion"
    assert plain["response"]["body"]["choices"][0]["text"] == 'a,"b"\nc'
    refused, failed, cancelled = bad
    assert refused["error"] is None
    assert refused["response"]["status_code"] == 400
    assert refused["response"]["body"]["error"] == {
        "message": "too long",
        "type": "invalid_request_error",
        "param": None,
        "code": "context_length_exceeded",
    }
    assert failed["response"]["status_code"] == 500
    assert cancelled["response"] is None
    assert cancelled["error"]["code"] == "batch_cancelled"
    ids = [line["id"] for line in good + bad]
    assert len(set(ids)) == 5


def test_two_openai_exports_are_byte_for_byte_equal(store: Store, job: Job, tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    for out in (one, other):
        export(store, job, out=out, form="openai", only="all")
    assert one.read_bytes() == other.read_bytes()
    assert errors_path(one).read_bytes() == errors_path(other).read_bytes()


def test_answers_of_an_adapter_name_it(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    job_id = mill.load_named(store, "sql", None)
    mill.work_off(store, mill.session(store, adapters=[Adapter("sql", "/a")]))
    lines = {}
    for form in ("jsonl", "openai"):
        export(store, store.jobs.job(job_id), out=None, form=form, only="all")
        lines[form] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("adapter", "none") for line in lines["jsonl"]] == ["sql", "none"]
    assert [line["response"]["body"]["model"] for line in lines["openai"]] == ["sql", "echo"]


def test_csv_quotes_what_needs_it(store: Store, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    export(store, job, out=None, form="csv", only="all")
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert tuple(header) == csv_columns("generation")
    assert rows[1][:4] == ["1", "plain", 'a,"b"\nc', "length"]
    assert dict(zip(header, rows[0], strict=True))["metadata"] == '{"a":"b"}'
    assert rows[2][6:8] == ["context_length_exceeded", "too long"]


LOGPROBS = {
    "content": [
        {
            "token": "he",
            "logprob": -0.1,
            "bytes": [104, 101],
            "top_logprobs": [
                {"token": "he", "logprob": -0.1, "bytes": [104, 101]},
                {"token": "ho", "logprob": -2.5, "bytes": [104, 111]},
            ],
        },
        {"token": "y", "logprob": -0.5, "bytes": [121], "top_logprobs": []},
    ]
}


@pytest.fixture
def rich(store: Store) -> Job:
    """A job whose outputs have several choices, logprobs and timings: one of messages, one of a prompt."""
    job_id = mill.begin(store, batch_size=4)
    store.creation.add(job_id, prompts=REQUESTS[:2], batch_size=4, lease_seconds=60)
    store.creation.open(job_id, spec=mill.ECHO_SPEC, file_sha256="", fingerprint="", lease_seconds=60)
    who = mill.session(store)
    (claimed,) = mill.claim(store, who)
    choices = (Choice("hey", "stop", LOGPROBS), Choice("ho", "length", {"content": []}))
    timings = Timings(0.25, 0.5, 1.0)
    outputs = [Output(RequestKey(job_id, index), choices, 3, 5, timings=timings) for index in (0, 1)]
    mill.save(store, who, [BatchReport(claimed.lease, outputs=outputs)])
    return store.jobs.job(job_id)


def test_jsonl_has_choices_logprobs_and_timings_where_there_are_some(
    store: Store, rich: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    export(store, rich, out=None, form="jsonl", only="all")
    first = json.loads(capsys.readouterr().out.split("\n")[0])
    assert first == {
        "index": 0,
        "custom_id": "chat",
        "text": "hey",
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "error": None,
        "logprobs": LOGPROBS,
        "choices": [
            {"text": "hey", "finish_reason": "stop", "logprobs": LOGPROBS},
            {"text": "ho", "finish_reason": "length", "logprobs": {"content": []}},
        ],
        "timings": {"queued_seconds": 0.25, "prefill_seconds": 0.5, "decode_seconds": 1.0},
        "user": "u",
        "metadata": {"a": "b"},
    }


def test_the_openai_format_has_every_choice_with_the_logprobs_of_its_endpoint(
    store: Store, rich: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    export(store, rich, out=None, form="openai", only="all")
    chat, plain = [json.loads(line)["response"]["body"] for line in capsys.readouterr().out.split("\n")[:-1]]
    assert chat["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hey", "refusal": None},
            "logprobs": LOGPROBS | {"refusal": None},
            "finish_reason": "stop",
        },
        {
            "index": 1,
            "message": {"role": "assistant", "content": "ho", "refusal": None},
            "logprobs": {"content": [], "refusal": None},
            "finish_reason": "length",
        },
    ]
    first, second = plain["choices"]
    assert first["text"] == "hey"
    assert first["logprobs"] == {
        "text_offset": [0, 2],
        "token_logprobs": [-0.1, -0.5],
        "tokens": ["he", "y"],
        "top_logprobs": [{"he": -0.1, "ho": -2.5}, {"y": -0.5}],
    }
    assert second["logprobs"] == {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}


def test_csv_keeps_its_columns_and_has_the_first_choice(
    store: Store, rich: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    export(store, rich, out=None, form="csv", only="all")
    header, first, _ = csv.reader(io.StringIO(capsys.readouterr().out))
    assert tuple(header) == csv_columns("generation")
    assert first[:4] == ["0", "chat", "hey", "stop"]


def test_an_output_without_anything_new_has_the_bytes_it_always_had(
    store: Store, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    export(store, job, out=None, form="jsonl", only="succeeded")
    assert capsys.readouterr().out.split("\n")[1] == (
        '{"index":1,"custom_id":"plain","text":"a,\\"b\\"\\nc","finish_reason":"length","prompt_tokens":5,'
        '"completion_tokens":6,"error":null}'
    )


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


# --- the same bytes, whatever happens -----------------------------------------------------------------------


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


def command(store: Store, *words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"BATCHMILL_DATABASE_URL": str(store.database.url), "PYTHONPATH": str(ROOT / "src")}
    environ |= more.pop("env", {})
    line = [*more.pop("through", []), sys.executable, "-m", "batchmill", *map(str, words)]
    return subprocess.run(line, text=True, env=environ, timeout=60, stderr=subprocess.PIPE, **more)


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


# --- a disk that is really full -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes rights that are missing here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


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


def test_a_submit_onto_a_full_disk_is_one_line_and_shows_no_half_job(
    sqlite_template: Path, small_disk: Path, tmp_path: Path
) -> None:
    database = small_disk / "store.db"
    database.write_bytes(sqlite_template.read_bytes())
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "%s"}\n' % ("x" * 400) * 12_000)
    store = Store(f"sqlite:///{database}")
    done = command(store, "submit", path, "-m", "echo", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (1, "")
    said = [line for line in done.stderr.splitlines() if line.startswith("batchmill: ")]
    assert said == [f"batchmill: no space left for the store sqlite:///{database}; free some and try again"]
    assert "Traceback" not in done.stderr
    assert store.jobs.jobs(most=5) == []
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    done = command(store, "submit", path, "-m", "echo", stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert [each.counts.total for each in store.jobs.jobs(most=5)] == [12_000]
    assert mill.rows(store, "requests") == 12_000
    store.close()
