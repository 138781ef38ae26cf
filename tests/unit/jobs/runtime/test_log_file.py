"""A worker's log file: written by several processes, rotated, and shown by `batchmill logs`."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.errors import NotFound
from batchmill.jobs.runtime.log_file import LogFile, log_path, logs_folder, rotate_if_large, worker_of
from batchmill.producer.cli.logs import Chosen, WorkerLog, choose, show
from batchmill.worker.process.own_log import make_place
from tests.support.paths import ROOT

CONSOLE = (
    "2026-11-21T16:20:58.1Z [info     ] batch begins    job=abcdefgh\n"
    "2026-11-21T16:20:58.2Z [warning  ] the device is hot   job=abcdefgh\n"
    "Traceback of the interpreter\n"
    "2026-11-21T16:20:58.4Z [error    ] another    job=zzzzzzzz\n"
)
JSON = (
    '{"event": "batch begins", "job": "abcdefgh", "level": "info", "timestamp": "2026-11-21T16:20:58.1Z"}\n'
    '{"event": "hot", "job": "abcdefgh", "level": "warning", "timestamp": "2026-11-21T16:20:58.2Z"}\n'
    "Traceback of the interpreter\n"
    '{"event": "another", "job": "zzzzzzzz", "level": "error", "timestamp": "2026-11-21T16:20:58.4Z"}\n'
)
#: Logs a line, and is killed.
KILLED = """\
import os, signal, sys
from pathlib import Path
from batchmill.jobs.runtime.logs import configure_logs, get_logger
from batchmill.jobs.configuration.settings import load_settings
configure_logs(level="info", form="console", file=Path(sys.argv[1]))
get_logger("a").info(sys.argv[2])
os.kill(os.getpid(), signal.SIGKILL)
"""
#: Logs 200 lines of 100 bytes.
WRITER = """\
import logging, sys
from pathlib import Path
from batchmill.jobs.runtime.log_file import LogFile
file = LogFile(Path(sys.argv[1]), file_bytes=30_000)
for number in range(200):
    file.handle(logging.makeLogRecord({"msg": f"{sys.argv[2]} {number}".ljust(99)}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = logs_folder(tmp_path)
    found.mkdir()
    return found


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("a", logging.INFO, "", 0, text, None, None)


def shown_by(show: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> list[str]:
    show()
    return capsys.readouterr().out.splitlines()


def test_a_line_is_in_the_file_once_it_is_logged(folder: Path) -> None:
    """A process that is killed right after leaves the line there, and the next process appends to it."""
    path = folder / "a.log"
    for word in ("first", "second"):
        line = [sys.executable, "-c", KILLED, path, word]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == -signal.SIGKILL
        assert word in done.stderr, "and stderr is told as before"
    assert [line.split()[-1] for line in path.read_text().splitlines()] == ["first", "second"]


def test_several_processes_rotate_one_file_and_lose_no_line(folder: Path) -> None:
    path = folder / "a.log"
    names = ("a", "b", "c", "d")
    started = [subprocess.Popen([sys.executable, "-c", WRITER, path, name], cwd=ROOT) for name in names]
    assert [each.wait() for each in started] == [0, 0, 0, 0]
    with closing(WorkerLog(path, Chosen(folder))) as kept:
        said = sorted(each.line.rstrip() for each in kept.new())
    assert said == sorted(f"{name} {number}" for name in names for number in range(200))
    # A second time only if nobody was held up: whoever finds the file being rotated writes on.
    assert (folder / "a.log.1").exists()


def test_of_the_older_files_two_are_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = LogFile(folder / "a.log", file_bytes=100)
    lines = [f"line {number}" for number in range(100)]
    for line in lines:
        file.emit(record(line))
    assert sorted(os.listdir(folder)) == ["a.log", "a.log.1", "a.log.2"]
    shown = shown_by(lambda: show(Chosen(folder), follow=False), capsys)
    assert shown == lines[-len(shown) :]
    assert len(shown) > 20


def test_a_file_that_another_process_rotates_is_left_to_it(folder: Path) -> None:
    path = folder / "a.log"
    path.write_text("x" * 100)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # of one that was stopped, say
        rotate_if_large(path, file_bytes=10)
        assert os.listdir(folder) == ["a.log"]
    rotate_if_large(path, file_bytes=10)
    assert os.listdir(folder) == ["a.log.1"]


@pytest.mark.parametrize("target", ["/dev/full", "/proc/version", "missing/a.log"])
def test_what_cannot_be_written_is_dropped(
    folder: Path, target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", True)
    (folder / "a.log").symlink_to(target)
    LogFile(folder / "a.log").handle(record("lost"))
    assert capsys.readouterr() == ("", "")


def test_a_home_that_takes_no_file_is_told_of_in_a_line(tmp_path: Path) -> None:
    assert make_place(tmp_path / "home", "a") is None
    assert log_path(tmp_path / "home", "a").exists()
    (tmp_path / "file").touch()
    hindrance = make_place(tmp_path / "file", "a")
    assert hindrance is not None
    assert "is a file" in hindrance
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "logs").touch()
    hindrance = make_place(tmp_path / "other", "a")
    assert hindrance is not None
    assert str(tmp_path / "other" / "logs") in hindrance


@pytest.mark.parametrize("name", ["gpu 1", "../../a", "a/b", "ä", "a[1]*", "."])
def test_a_worker_of_any_name_has_a_file(tmp_path: Path, name: str) -> None:
    assert make_place(tmp_path, name) is None
    (path,) = logs_folder(tmp_path).iterdir()
    assert path == log_path(tmp_path, name)
    assert worker_of(path) == name


def test_of_more_workers_than_two_hundred_the_oldest_files_go(tmp_path: Path) -> None:
    for number in range(202):
        assert make_place(tmp_path, str(number)) is None
        path = log_path(tmp_path, str(number))
        os.utime(path, (number, number))
        path.with_name(f"{path.name}.1").touch()
    assert make_place(tmp_path, "201") is None
    assert {path.stem for path in logs_folder(tmp_path).glob("*.log")} == {str(number) for number in range(2, 202)}
    assert len(list(logs_folder(tmp_path).glob("*.log.1"))) == 200


@pytest.mark.parametrize("text", [CONSOLE, JSON])
def test_lines_are_chosen_by_level_and_job(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.log").write_text(text)
    lines = text.splitlines()
    for chosen, expected in (
        (Chosen(folder), lines),
        (Chosen(folder, level="warning"), lines[1:]),
        (Chosen(folder, level="error"), lines[3:]),
        (Chosen(folder, job_id="abcdefgh"), lines[:3]),
        (Chosen(folder, job_id="zzzzzzzz"), lines[3:]),
    ):
        assert shown_by(lambda chosen=chosen: show(chosen, follow=False), capsys) == expected, chosen  # type: ignore[misc]


def test_the_lines_of_several_workers_are_merged_by_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.log").write_text("2026-11-21T16:20:58.1Z [info     ] one\n2026-11-21T16:20:58.3Z [info     ] three\n")
    (folder / "b.log").write_text("2026-11-21T16:20:58.2Z [info     ] two\n")
    shown = shown_by(lambda: show(Chosen(folder), follow=False), capsys)
    assert [line[:2] + line.split()[-1] for line in shown] == ["a:one", "b:two", "a:three"]


def test_who_has_no_log_is_told(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path)
    with pytest.raises(NotFound, match="no worker of this machine has left a log"):
        choose(None, level=None, settings=settings)
    logs_folder(tmp_path).mkdir()
    path = log_path(tmp_path, "a")
    path.write_text(CONSOLE)
    assert choose("a", level=None, settings=settings).file == path
    with pytest.raises(NotFound, match="no worker 'b' has a log"):
        choose("b", level=None, settings=settings)


def test_that_there_is_no_such_line_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "a.log"
    path.write_text(CONSOLE)
    rest = "; `batchmill logs` shows all of their lines\n"
    for chosen, told in (
        (
            Chosen(folder, job_id="yyyyyyyy"),
            f"no worker of this machine has said anything about job yyyyyyyy{rest}",
        ),
        (
            Chosen(folder, job_id="abcdefgh", level="error"),
            f"no worker of this machine has said anything of level error or above about job abcdefgh{rest}",
        ),
        (Chosen(folder, file=path, level="error"), ""),
        (Chosen(folder, file=folder / "b.log"), "worker b has not said anything\n"),
    ):
        show(chosen, follow=False)
        assert capsys.readouterr().err == told


def test_who_follows_sees_each_line_once_whole_and_over_a_rotation(folder: Path) -> None:
    path = folder / "a.log"
    path.write_text("one\n")
    with closing(WorkerLog(path, Chosen(folder))) as followed:

        def new() -> list[str]:
            return [each.line for each in followed.new()]

        assert new() == ["one"]
        with path.open("a") as file:
            file.write("two\nthr")
        assert new() == ["two"]
        with path.open("a") as file:
            file.write("ee\nfour\n")
        rotate_if_large(path, file_bytes=1)
        assert new() == ["three", "four"]
        path.write_text("five\n")
        assert new() == ["five"]
        assert new() == []


def test_no_command_writes_answers_over_a_log(folder: Path) -> None:
    (folder / "a.log.1").touch()
    assert folder / "a.log.1" in load_settings(home=folder.parent).files
