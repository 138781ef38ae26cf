"""`batchmill submit` on bad input: a line for each problem, exit code 2, at once and in flat memory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from batchmill.jobs.errors import PromptFileError
from batchmill.producer.files import prompt_file as prompts_module
from batchmill.producer.files.prompt_file import PromptFile
from batchmill.producer.submission import Submission
from tests.support.paths import ROOT
from tests.support.processes import forked
from tests.support.store import mill

MOST_BYTES = 200_000_000


@pytest.fixture
def environ(sqlite_url: str) -> dict[str, str]:
    return os.environ | {"BATCHMILL_DATABASE_URL": sqlite_url, "PYTHONPATH": str(ROOT / "src")}


def command(environ: dict[str, str], *words: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return forked.finished(words, env=environ, stdin=stdin)


def test_the_command_says_a_line_for_each_problem_and_exits_with_2(environ: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt":"a"}\n{"prompt":"\\u0000"}\n\xff\n{"prompt":"a","custom_id":"request-0"}\n')
    done = command(environ, "submit", path, "-m", "echo")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"{path}:2: holds a NUL character (\\u0000)",
        f"{path}:3: not UTF-8: byte 35 is 0xff",
        f"{path}:4: duplicate custom_id 'request-0', first used at line 1",
        f"batchmill: {path}: 3 bad lines",
    ]
    assert json.loads(command(environ, "jobs", "--json").stdout) == []


def test_an_id_that_cannot_be_printed_is_told_all_the_same(environ: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt":"a"}\n')
    line = [sys.executable, "-m", "batchmill", "submit", str(path), "-m", "echo"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, env=environ, timeout=60)
    [job] = json.loads(command(environ, "jobs", "--json").stdout)
    said = f"batchmill: cannot write the id of job {job['id']} to stdout: No space left on device"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, said)


@pytest.mark.parametrize("option", ["--name", "--system", "--stop", "--model", "--revision", "--idempotency-key"])
def test_an_option_that_is_no_text_is_refused_in_one_line(environ: dict[str, str], tmp_path: Path, option: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt":"a"}\n')
    done = command(environ, "submit", path, "-m", "echo", option, os.fsdecode(b"caf\xe9"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("batchmill: --")
    assert len(done.stderr.splitlines()) == 1


#: Runs a command from a small process: the kernel counts what a process had before its exec as its own.
MEASURED = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, used = os.wait4(process.pid, 0)
print(os.waitstatus_to_exitcode(status), used.ru_maxrss, used.ru_utime + used.ru_stime, flush=True)
os._exit(0)
"""


def peak_of(environ: dict[str, str], *words: str | Path, stdin: int) -> tuple[int, int, float]:
    """Exit code, peak resident bytes and seconds of CPU of a command."""
    line = [sys.executable, "-c", MEASURED, sys.executable, "-m", "batchmill", *map(str, words)]
    done = subprocess.run(line, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ, check=True)
    code, peak_kib, seconds = done.stdout.split()[-3:]
    return int(code), int(peak_kib) * 1024, float(seconds)


def test_an_endless_line_is_given_up_soon_and_in_flat_memory(environ: dict[str, str], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    block = b"x" * (1 << 20)

    def write() -> None:
        with pipe.open("wb", buffering=0) as out:
            try:
                for _ in range(10 << 10):  # ten gibibytes, were anybody to read them
                    out.write(block)
            except BrokenPipeError:
                gave_up.set()

    gave_up = threading.Event()
    writer = threading.Thread(target=write)
    writer.start()
    code, peak_bytes, seconds = peak_of(environ, "submit", pipe, "-m", "echo", stdin=subprocess.DEVNULL)
    writer.join(30)
    assert gave_up.is_set()
    with open("/dev/zero", "rb") as zeros:
        from_stdin = peak_of(environ, "submit", "-", "-m", "echo", stdin=zeros.fileno())
    assert (code, from_stdin[0]) == (2, 2)
    assert max(peak_bytes, from_stdin[1]) < MOST_BYTES
    assert max(seconds, from_stdin[2]) < 20


def test_what_is_said_of_an_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts_module, "ENDLESS_BYTES", 2 << 20)
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt":"fine"}\nbad\n' + bytes(4 << 20) + b"\nbad\n")
    with PromptFile(str(path), max_line_bytes=1 << 20) as prompts:
        assert [line.number for line in prompts] == [1]
        with pytest.raises(PromptFileError, match="2 bad lines; reading stopped 2 MiB into the last one") as said:
            prompts.raise_if_bad()
    assert (
        said.value.problems[1] == f"{path}:3: longer than 1048576 bytes; raise the setting max_line_bytes to allow it"
    )


@pytest.mark.parametrize("what", ["missing", "folder", "/dev/zero", "loop", "socket", "unreadable"])
def test_what_is_no_file_is_refused_at_once(environ: dict[str, str], tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path)
    elif what == "unreadable":
        path = Path("/proc/self/mem")  # opens for everybody, and cannot be read at its beginning by anybody
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(what)  # in the current folder, since the path of a socket is short
    # `--once` and `run` read a file for its hash first, and neither may trip over it there.
    for words in (["submit", "--once"], ["run"])[: 2 if what == "unreadable" else 1]:
        own = {**environ, "BATCHMILL_DATABASE_URL": ""} if words == ["run"] else environ
        done = command(own, *words, "/dev/zero" if what == "/dev/zero" else path, "-m", "echo")
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("batchmill: ")


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt":"a"}\n')
    path.chmod(0)
    who = os.geteuid()
    if who == 0:
        os.seteuid(65534)  # root reads everything
    try:
        with pytest.raises(PromptFileError, match="cannot be read: Permission denied"):
            PromptFile(str(path))
        assert Submission(str(path), "echo").fingerprint_of_file(mill.ECHO_SPEC) is None
    finally:
        os.seteuid(who)
