"""`run`: the whole mill in one command, interrupted, continued, killed, and fed while it reads."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.runtime.log_file import FILE_BYTES, logs_folder
from batchmill.jobs.store.jobs.create import MAX_REQUESTS
from batchmill.jobs.store.store import Store
from tests.integration.conftest import PATIENCE_SECONDS, until, write_prompts
from tests.support.processes.home import Home, texts

SLOW = {"BATCHMILL_ECHO_STEP_SECONDS": "0.1", "BATCHMILL_ENGINE_ROWS": "10"}


def test_run_answers_reports_and_stops_all_that_it_started(home: Home, tmp_path: Path) -> None:
    file, out = write_prompts(tmp_path / "p.jsonl", 100), tmp_path / "out.jsonl"
    done = home.run("run", file, "-m", "echo", "-o", out)
    assert texts(out) == [f"one two three {index}" for index in range(100)]
    assert done.stdout == ""
    assert "finished   100 stop\n" in done.stderr
    for word in ("requests", "tokens/s", "memory", "seconds", "queued", "running"):
        assert word in done.stderr
    assert home.processes() == []


def test_run_writes_what_the_suffix_says_and_reads_what_format_says(home: Home, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text('{"prompt": "one"}\n' * 2)
    for out, said in (("a.parquet", "answers are not written as Parquet"), ("a.csv", "looks like JSON Lines")):
        refused = home.run("run", file, "-m", "echo", "-o", tmp_path / out, code=2)
        assert said in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    for form, text in (("text", '{"prompt": "one"}'), ("jsonl", "one")):
        home.run("run", file, "-m", "echo", "--format", form, "-o", tmp_path / "a.csv")
        rows = csv.DictReader((tmp_path / "a.csv").read_text().splitlines())
        assert [row["text"] for row in rows] == [text] * 2


def test_the_same_run_again_exports_and_new_runs_anew(home: Home, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "p.jsonl", 10)
    first = home.run("run", file, "-m", "echo").stdout
    again = home.run("run", file, "-m", "echo")
    assert again.stdout == first
    assert "--new" in again.stderr
    assert len(json.loads(home.run("jobs", "--json").stdout)) == 1
    home.run("run", file, "-m", "echo", "--new")
    home.run("run", file, "-m", "echo", "--max-tokens", "2")
    assert len(json.loads(home.run("jobs", "--json").stdout)) == 3


def test_a_run_holds_its_adapters_and_another_meaning_of_a_name_is_another_job(home: Home, tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": "a", "adapter": "sql"}, {"prompt": "b"}, {"prompt": "c", "model": "sql"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for folder in ("one", "other", "one"):
        home.run("run", file, "-m", "echo", "--adapter", f"sql={tmp_path / folder}", "-o", out)
        assert [json.loads(line).get("adapter") for line in out.read_text().splitlines()] == ["sql", None, "sql"]
    jobs: list[dict[str, Any]] = json.loads(home.run("jobs", "--json").stdout)
    meant = [json.loads(home.run("status", each["id"], "--json").stdout)["adapters"] for each in jobs]
    assert [each["sql"]["path"] for each in meant] == [str(tmp_path / "other"), str(tmp_path / "one")]


def test_ctrl_c_ends_a_run_cleanly_and_the_same_command_continues_it(home: Home, tmp_path: Path) -> None:
    file, out = write_prompts(tmp_path / "p.jsonl", 1_000), tmp_path / "out.jsonl"
    process = home.start("run", file, "-m", "echo", "-o", out, **SLOW)
    until(lambda: home.succeeded() > 10, "some answers")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, said
    assert "stopping: finished outputs are saved; the same command continues job " in said
    assert not out.exists()
    kept = home.succeeded()
    assert home.processes() == []
    done = home.run("run", file, "-m", "echo", "-o", out)
    assert "continues where it was interrupted" in done.stderr
    assert texts(out) == [f"one two three {index}" for index in range(1_000)]
    store = Store(home.settings.database)
    (job,) = store.jobs.jobs(most=5)
    assert job.counts.succeeded == 1_000 > kept > 10
    store.close()


def test_what_a_killed_run_left_ends_and_the_next_run_continues(home: Home, tmp_path: Path) -> None:
    file, out = write_prompts(tmp_path / "p.jsonl", 1_000), tmp_path / "out.jsonl"
    process = home.start("run", file, "-m", "echo", "-o", out, **SLOW)
    until(lambda: home.succeeded() > 10, "some answers")
    process.kill()
    process.communicate()
    home.run("run", file, "-m", "echo", "-o", out)
    assert texts(out) == [f"one two three {index}" for index in range(1_000)]


def test_a_likely_slip_in_the_name_of_a_model_ends_a_run_at_once(home: Home, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "p.jsonl", 1)
    for words in (("run", file, "-m", "dmeo"), ("submit", file, "-m", "dmeo", "--wait")):
        assert "did you mean demo?" in home.run(*words, code=2).stderr
    assert "did you mean demo?" in home.run("submit", file, "-m", "dmeo").stderr
    assert len(json.loads(home.run("jobs", "--json").stdout)) == 1


def test_a_run_goes_on_without_its_redis(home: Home, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "p.jsonl", 500)
    running = home.start("run", file, "-m", "echo", "--device", "cpu", "-o", tmp_path / "a.jsonl", **SLOW)
    until(lambda: home.succeeded() > 10, "some answers")
    os.kill(*home.redis_pids(), signal.SIGKILL)
    _, said = running.communicate(timeout=PATIENCE_SECONDS)
    assert running.returncode == 0, said
    assert "the embedded Redis had ended and is started again" in said
    assert texts(tmp_path / "a.jsonl") == [f"one two three {index}" for index in range(500)]


def no_model(folder: Path) -> Path:
    """A folder that looks like a model and cannot be loaded."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return model


def test_a_model_that_cannot_be_loaded_ends_the_run_with_its_reason(home: Home, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "p.jsonl", 10)
    begin = time.monotonic()
    done = home.run("run", file, "-m", no_model(tmp_path), code=1)
    assert "cannot load" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begin < 60
    assert home.succeeded() == 0


def test_a_run_that_fails_shows_its_own_lines_and_keeps_those_of_the_one_before(home: Home, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "p.jsonl", 3)
    home.run("run", file, "-m", "echo")
    before = (home.path / "worker.log").read_text()
    assert "ready" in before
    done = home.run("run", file, "-m", no_model(tmp_path), code=1)
    assert "cannot load" in done.stderr
    assert "ready" not in done.stderr
    assert (home.path / "worker.log").read_text().startswith(before)
    kept = [path.read_text() for path in logs_folder(home.path).iterdir()]
    assert sum("worker starts" in text for text in kept) == 2


def test_children_that_end_before_they_report_end_the_run_with_their_last_lines(home: Home, tmp_path: Path) -> None:
    """The user who sets PYTHONPATH is trusted, and may be wrong."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'spawn_main' in ' '.join(sys.orig_argv):\n"
        "    print('no luck today', file=sys.stderr, flush=True)\n    os._exit(3)\n"
    )
    file = write_prompts(tmp_path / "p.jsonl", 3)
    done = home.run("run", file, "-m", "echo", code=1, PYTHONPATH=str(tmp_path))
    told = re.search(r"(\d+) processes in a row ended before they could load the model; the last lines:", done.stderr)
    assert told is not None, done.stderr
    assert int(told[1]) >= 3  # and more where several ended between two looks
    assert "no luck today" in done.stderr
    assert "Traceback" not in done.stderr
    (row,) = home.rows()
    assert row.state is WorkerState.FAILED
    assert "no luck today" in str(row.error)


def test_a_worker_that_cannot_even_begin_ends_the_run_with_its_last_lines(home: Home, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif '--job' in sys.orig_argv and '--devices' not in sys.orig_argv:\n"
        "    print('no luck today', file=sys.stderr, flush=True)\n    os._exit(3)\n"
    )
    file = write_prompts(tmp_path / "p.jsonl", 3)
    done = home.run("run", file, "-m", "echo", code=1, PYTHONPATH=str(tmp_path))
    assert "no luck today" in done.stderr
    assert "it ends before it is in the store" in done.stderr
    assert "Traceback" not in done.stderr
    assert home.rows() == []


def a_stream(home: Home, lines: int, *words: str) -> subprocess.Popen[str]:
    """A `run` whose input goes on after so many lines."""
    process = home.start("run", "-", *words, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write('{"prompt": "one two three"}\n' * lines)
    process.stdin.flush()
    return process


def test_the_worker_loads_while_the_file_is_being_read(home: Home) -> None:
    process = a_stream(home, 2 * MAX_REQUESTS, "-m", "echo")
    until(lambda: home.worker_states() == [WorkerState.READY], "the worker is ready")
    assert home.jobs() == []  # nobody sees a job before its file is whole
    out, err = process.communicate('{"prompt": "the last"}\n', timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, err
    answers = [json.loads(line)["text"] for line in out.splitlines()]
    assert len(answers) == 2 * MAX_REQUESTS + 1
    assert answers[-1] == "the last"
    assert home.worker_states() == [WorkerState.STOPPED]


def test_a_worker_that_cannot_load_ends_the_run_while_its_file_is_being_read(home: Home, tmp_path: Path) -> None:
    process = a_stream(home, 2 * MAX_REQUESTS, "-m", str(no_model(tmp_path)))
    until(lambda: home.worker_states() == [WorkerState.FAILED], "the worker has given up")
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        while process.poll() is None:
            process.stdin.write('{"prompt": "one"}\n' * MAX_REQUESTS)
            process.stdin.flush()
    assert process.wait(PATIENCE_SECONDS) == 1
    assert process.stderr is not None
    err = process.stderr.read()
    assert "the worker ended before the job did; its last lines:" in err
    assert home.jobs() == []


def test_a_bad_file_of_one_page_starts_no_worker(home: Home, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "one"}\n' * 5 + "{\n" + '{"prompt": "two"}\n' * 5)
    assert "p.jsonl:6:" in home.run("run", file, "-m", "echo", code=2).stderr
    assert home.rows() == []
    assert not (home.path / "worker.log").read_text()


def test_a_worker_log_that_has_grown_large_is_rotated(home: Home, tmp_path: Path) -> None:
    home.path.mkdir()
    (home.path / "worker.log").write_bytes(bytes(FILE_BYTES))
    file = tmp_path / "p.jsonl"
    file.write_text("{\n")
    home.run("run", file, "-m", "echo", code=2)
    sizes = {path.name: path.stat().st_size for path in home.path.glob("worker.log*")}
    assert sizes == {"worker.log": 0, "worker.log.1": FILE_BYTES}


def test_run_refuses_a_store_that_is_not_embedded(home: Home, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "p.jsonl", 10)
    done = home.run("run", file, "-m", "echo", code=2, BATCHMILL_DATABASE_URL="postgresql://somewhere/else")
    assert "BATCHMILL_DATABASE_URL" in done.stderr
