"""Commands in broken surroundings: one line and the way out, and what can be done is done."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.processes import forked
from tests.support.processes.forked import request

COMMANDS = [
    "status",
    "jobs",
    "workers",
    "wait --timeout 1",
    "results",
    "cancel last",
    "retry last",
    "submit x.jsonl -m echo",
    "run x.jsonl -m echo",
    "up -m echo",
    "doctor last",
    "db upgrade",
    "db current",
    "db check",
    "db new-id",
    "worker -m echo",
]
#: Those that write nothing.
READING = ["db current", "db check"]
CHECKS = ["python", "home", "redis", "database", "disk"]


def garbage(home: Path, template: Path) -> str:
    (home / "batchmill.db").write_bytes(b"no database " * 1_000)
    return "is no SQLite database; move the file away"


def of_another_program(home: Path, template: Path) -> str:
    with sqlite3.connect(home / "batchmill.db") as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.close()
    return "holds the tables of another program (bookmarks)"


def of_another_alembic(home: Path, template: Path) -> str:
    shutil.copy(template, home / "batchmill.db")
    with sqlite3.connect(home / "batchmill.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '1975ea83b712'")
    connection.close()
    return "holds the tables of another program"


def torn(home: Path, template: Path) -> str:
    whole = template.read_bytes()
    (home / "batchmill.db").write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    return "is damaged"


def folder_for_a_file(home: Path, template: Path) -> str:
    (home / "batchmill.db").mkdir()
    return "allow it, or name another by BATCHMILL_HOME"


STORES = [garbage, of_another_program, of_another_alembic, torn, folder_for_a_file]
#: Homes of which nothing can be made, beside a file `x.jsonl`; and what is said.
HOMES = {
    "x.jsonl": "is a file; name a folder",
    "x.jsonl/below/it": "which is a file; name a folder",
    "/proc/nowhere/home": "cannot be used",
    "a" * 4_000: "File name too long; use a shorter name",
    "b/" * 50_000: "File name too long; use a shorter name",
}


@pytest.fixture(autouse=True)
def prompts(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "x"}\n')


def environ_of(home: Path | str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    return {"PATH": os.environ["PATH"], "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "BATCHMILL_HOME": str(home)}


def computed(words: Sequence[str], home: Path | str) -> dict[str, Any]:
    """Runs a command that uses torch in this home."""
    done = forked.finished(words, env=environ_of(home), folder=Path.cwd(), computes=True)
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr}


def all_of(commands: Sequence[Sequence[str]], home: Path | str, *, limit: str = "") -> list[dict[str, Any]]:
    """Runs these commands in this home, and returns the result of each; `limit`: a shell line to run before."""
    done = subprocess.run(
        ["bash", "-c", f"{limit}\n exec {sys.executable} -m tests.support.processes.forked"],
        input="".join(map(forked_line, commands)),
        capture_output=True,
        text=True,
        env=environ_of(home),
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def forked_line(words: Sequence[str]) -> str:
    """Asks for one command; `worker` would become another process."""
    worker = words[0] == "worker"
    return f"{request(words[1:], module='batchmill.worker') if worker else request(words)}\n"


def check_words(words: str, found: dict[str, Any], said: str) -> None:
    assert "Traceback" not in found["err"], words
    assert found["err"].count("\n") == 1, f"{words}: {found['err']}"
    assert found["err"].startswith("batchmill: "), words
    assert said in found["err"], f"{words}: {found['err']}"
    assert len(found["err"]) < 1_000, words
    assert found["code"] in (1, 2), words
    assert found["out"] == "", words


def check_everywhere(home: Path | str, said: str, *, but: Collection[str] = ()) -> None:
    """Every command ends with the same line, and the doctor goes on with its other checks."""
    *found, doctor = all_of([*map(str.split, COMMANDS), ["doctor", "--json"]], home)
    for words, each in zip(COMMANDS, found, strict=True):
        if words not in but:
            check_words(words, each, said)
    assert doctor["code"] == 1, doctor
    assert "Traceback" not in doctor["err"]
    checks = {each["name"]: each for each in json.loads(doctor["out"])}
    assert set(CHECKS) <= set(checks)
    assert any(said in each["found"] for each in checks.values() if not each["ok"]), checks


@pytest.mark.parametrize("make", STORES)
def test_every_command_tells_of_a_store_that_is_none(
    make: Callable[[Path, Path], str], tmp_path: Path, sqlite_template: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    said = make(home, sqlite_template)
    file = home / "batchmill.db"
    before = file.read_bytes() if file.is_file() else b""
    check_everywhere(home, said)
    assert (file.read_bytes() if file.is_file() else b"") == before


@pytest.mark.parametrize("home", HOMES, ids=["file", "below", "nowhere", "long", "longer"])
def test_every_command_tells_of_a_home_that_cannot_be(home: str) -> None:
    check_everywhere(home, HOMES[home])


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small disk as a home; skipped where the test may not mount one."""
    home = tmp_path / "home"
    home.mkdir()

    def mount(options: str) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(home)]
        if os.geteuid() != 0 or subprocess.run(words, capture_output=True).returncode != 0:
            pytest.skip("only root may mount a disk")
        return home

    yield mount
    subprocess.run(["umount", "-l", str(home)], capture_output=True)


def test_every_command_tells_of_a_home_that_is_read_only(mounted: Callable[[str], Path]) -> None:
    check_everywhere(mounted("ro"), "BATCHMILL_HOME")


def test_every_command_tells_of_a_full_disk(mounted: Callable[[str], Path]) -> None:
    home = mounted("size=16k")
    with (home / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4_096)
    check_everywhere(home, "free some", but=READING)


def test_every_command_tells_that_no_file_may_be_written(tmp_path: Path) -> None:
    """`ulimit -f 0`, as some batch systems set it."""
    commands = [each for each in COMMANDS if each not in READING]
    for words, found in zip(
        commands, all_of([*map(str.split, commands)], tmp_path / "home", limit="ulimit -f 0"), strict=True
    ):
        check_words(words, found, "to any size" if "File too large" not in found["err"] else "ulimit -f")


@pytest.mark.parametrize("length", [4_000, 100_000])
def test_every_command_tells_of_a_name_that_is_too_long(length: int, tmp_path: Path) -> None:
    name = "n" * length
    commands = [
        *([word, name] for word in ("status", "wait", "results", "cancel", "retry", "doctor")),
        ["results", "last", "-o", name],
        ["submit", name, "-m", "echo"],
        *(["submit", "x.jsonl", "-m", each] for each in (name, f"./{name}", f"/{name}")),
        ["submit", "x.jsonl", "-m", "/m/" * (length // 3), "--remote-path"],
        ["submit", "x.jsonl", "-m", "org/name", "--revision", name],
        ["submit", "x.jsonl", "-m", "demo", "-q", name],
        *(["submit", "x.jsonl", "-m", "echo", each, name] for each in ("--name", "--idempotency-key", "--adapter")),
        ["run", name, "-m", "echo"],
        ["run", "x.jsonl", "-m", name],
        ["run", "x.jsonl", "-m", "echo", "-o", name],
        ["run", "x.jsonl", "-m", "demo", "--adapter", f"a={name}"],
        ["up", "-m", name],
        ["up", "-m", "org/name", "--revision", name],
        ["worker", "-m", name],
        ["worker", "-m", "echo", "--name", name],
        ["worker", "-m", "demo", "--device", name],
        ["worker", "-m", "demo", "--adapter", f"a={name}"],
    ]
    assert all_of([["db", "upgrade"]], tmp_path / "home")[0]["code"] == 0
    for words, found in zip(commands, all_of(commands, tmp_path / "home"), strict=True):
        shown = " ".join(word[:20] for word in words)
        assert found["code"] in (1, 2, 3), shown
        assert found["err"].startswith("batchmill: "), f"{shown}: {found['err'][:2_000]}"
        assert found["err"].count("\n") == 1, f"{shown}: {found['err'][:2_000]}"
        assert len(found["err"]) < 1_000, shown
        assert found["out"] == "", shown


def test_what_needs_no_store_does_without(tmp_path: Path) -> None:
    (tmp_path / "batchmill.db").write_bytes(b"no database " * 1_000)
    commands = [["plan", "demo", "--devices", "cpu"], ["models", "quantize", "demo", "copy", "-q", "nf4"]]
    for home, told in ((tmp_path, "is no SQLite database"), (tmp_path / "x.jsonl", "")):
        plan, quantize = (computed(words, home) for words in commands)
        assert (plan["code"], quantize["code"]) == (0, 0), (plan["err"], quantize["err"])
        assert "nf4" in plan["out"]
        assert told in plan["err"]
        assert plan["err"].count("\n") == bool(told)
        assert quantize["err"] == ""
        shutil.rmtree(tmp_path / "copy")


@pytest.mark.parametrize("make", [garbage, of_another_program, torn])
def test_an_evaluation_looks_at_its_store_before_it_loads_a_model(
    make: Callable[[Path, Path], str], tmp_path: Path, sqlite_template: Path
) -> None:
    said = make(tmp_path, sqlite_template)
    found = computed(["evaluate", "demo", "-q", "nf4", "--data", "x.jsonl"], tmp_path)
    check_words("evaluate", found, said)


def test_a_copy_that_does_not_fit_on_the_disk_is_one_line(mounted: Callable[[str], Path]) -> None:
    disk = mounted("size=64k")
    found = computed(["models", "quantize", "demo", str(disk / "copy"), "-q", "nf4"], "unused")
    check_words("models quantize", found, "No space left on device")
    assert list(disk.iterdir()) == []


def test_a_run_with_a_closed_stderr_answers(tmp_path: Path) -> None:
    assert ran(tmp_path, "run x.jsonl -m echo 2>&-") == (0, "x", "")


def test_a_run_whose_stderr_is_full_answers(tmp_path: Path) -> None:
    assert ran(tmp_path, "run x.jsonl -m echo 2>/dev/full") == (0, "x", "")


@pytest.mark.parametrize("words", ["jobs --json", "--help", "db current", "submit x.jsonl -m echo", "doctor"])
def test_an_output_that_takes_nothing_is_one_line(words: str, tmp_path: Path) -> None:
    code, out, err = ran(tmp_path, f"{words} >/dev/full")
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("batchmill: "), err
    assert "stdout" in last
    assert "No space left on device" in last
    assert "Traceback" not in err
    assert "Exception ignored" not in err


def ran(home: Path, words: str) -> tuple[int, str, str]:
    """The exit code, stdout (of answers their texts) and stderr of a command in a shell."""
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src"), "BATCHMILL_HOME": str(home / "home")}
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m batchmill {words}"], capture_output=True, text=True, env=environ
    )
    out = done.stdout
    return done.returncode, json.loads(out)["text"] if out.startswith("{") else out, done.stderr
