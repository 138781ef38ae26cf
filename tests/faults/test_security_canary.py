"""Passwords and prompts are planted everywhere, and then looked for in all that batchmill says, also when it fails."""

# ruff: noqa: F811  (imported fixtures)
from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select, text

from batchmill.jobs.store.tables import metadata
from tests.integration.conftest import Mill, until
from tests.support.servers.site import Site, site, site_mill  # noqa: F401

#: Begins every word of a prompt, and so of an echoed answer; nothing else has it.
WORD = "zanary"


class Watched:
    """Runs commands and keeps all that they say, and the command lines of all processes while they run."""

    def __init__(self, mill: Mill, site: Site, folder: Path) -> None:
        self.mill = mill
        self.said: list[str] = []
        self._folder = folder
        self._secrets = list(site.passwords.values())
        self._started: list[tuple[subprocess.Popen[str], Path]] = []

    def run(self, *words: str | Path, code: int | None = 0, stdin: str | None = None, **settings: object) -> str:
        """A command to its end: its stdout."""
        done = self.mill.finished(*words, stdin=stdin, **settings)
        said = f"$ {words}\n{done.stdout}\n{done.stderr}"
        assert code is None or done.returncode == code, said
        self.said.append(said)
        return done.stdout

    def start(self, *words: str | Path, **settings: object) -> subprocess.Popen[str]:
        """A command that goes on, whose output goes to a file."""
        log = self._folder / f"said-{len(self._started)}.log"
        command = [sys.executable, "-m", "batchmill", *map(str, words)]
        with log.open("w") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, text=True, env=self.mill.environ(**settings)
            )
        self._started.append((process, log))
        return process

    def look_at_processes(self) -> None:
        for process, _ in self._started:
            if process.poll() is None:
                family = psutil.Process(process.pid)
                self.said += [" ".join(each.cmdline()) for each in (family, *family.children(recursive=True))]

    def end(self) -> None:
        for process, log in self._started:
            if process.poll() is None:
                process.terminate()
            process.wait(120)
            self.said.append(log.read_text())

    def leaks(self) -> list[str]:
        """Every line with a password or a word of a prompt in it."""
        lines = "\n".join(self.said).splitlines()
        return [line[:400] for line in lines if WORD in line or any(each in line for each in self._secrets)]


@pytest.fixture
def watched(site_mill: Mill, site: Site, tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(site_mill, site, tmp_path)
    yield watched
    watched.end()


def write_canaries(path: Path, *prompts: str, count: int = 40) -> Path:
    """Prompts of words that nothing else says; `prompts` stand between them, each with such a word."""
    own = [f"{WORD}{secrets.token_hex(4)} {WORD}{secrets.token_hex(4)}" for _ in range(count)]
    lines = [*own[: count // 2], *(f"{prompt} {WORD}{secrets.token_hex(4)}" for prompt in prompts), *own[count // 2 :]]
    path.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    return path


def as_worker(site: Site) -> dict[str, object]:
    return {"broker_url": site.broker_url("worker"), "database_url": site.database_url("worker")}


@pytest.mark.parametrize("log_format", ["console", pytest.param("json", marks=pytest.mark.slow)])
def test_nothing_is_said_of_passwords_and_prompts_when_all_is_well(
    watched: Watched, site: Site, tmp_path: Path, log_format: str
) -> None:
    settings = {"log_level": "debug", "log_format": log_format}
    watched.start("worker", "-m", "echo", **settings, **as_worker(site), echo_step_seconds=0.3, engine_rows=10)
    job = watched.run("submit", write_canaries(tmp_path / "p.jsonl"), "-m", "echo", **settings).strip()
    watched.look_at_processes()
    watched.run("wait", job, "--timeout", "300", **settings)
    for words in (
        ("status",),
        ("status", "--json"),
        ("jobs",),
        ("jobs", "--json"),
        ("workers",),
        ("workers", "--json"),
    ):
        watched.run(*words, **settings)
    watched.run("doctor", **settings)
    watched.run("doctor", "--json", **settings)
    watched.run("db", "current", **settings)
    watched.run("results", job, "-o", tmp_path / "answers.jsonl", **settings)
    assert WORD in (tmp_path / "answers.jsonl").read_text(), "the results themselves have them"
    watched.end()
    assert watched.leaks() == []
    assert _in_redis(site) == []
    assert _passwords_in_store(watched.mill, site) == []


def _in_redis(site: Site) -> list[str]:
    """Every key of Redis with a word of a prompt or a password in what it holds."""
    admin = site.client("admin")
    held = {key: str(admin.dump(key)) for key in admin.scan_iter()}
    return [
        str(key) for key, value in held.items() if WORD in value or any(p in value for p in site.passwords.values())
    ]


def _passwords_in_store(mill: Mill, site: Site) -> list[str]:
    """The tables with a password in a row."""
    found = []
    with mill.store.database.read() as connection:
        for table in metadata.sorted_tables:
            rows = str(connection.execute(select(table)).all())
            found += [table.name for each in site.passwords.values() if each in rows]
    return found


def test_nothing_is_said_of_them_when_processes_crash(watched: Watched, site: Site, tmp_path: Path) -> None:
    prompts = write_canaries(tmp_path / "p.jsonl", "!segv", "!sticky")
    worker = watched.start("worker", "-m", "echo", chaos=True, log_level="debug", **as_worker(site))
    job = watched.run("submit", prompts, "-m", "echo").strip()
    watched.run("wait", job, "--timeout", "300", code=None)
    watched.run("status", job, "--json")
    worker.terminate()
    watched.end()
    assert any("Traceback" in said or "the child died" in said for said in watched.said)
    assert watched.leaks() == []


def test_nothing_is_said_of_them_when_a_bug_is_told_of_by_the_database(
    watched: Watched, site: Site, tmp_path: Path
) -> None:
    """A statement that the database refuses for a reason that nobody foresaw: its error has the row in it."""
    site.as_superuser(f"ALTER TABLE outputs ADD CONSTRAINT bug CHECK (payload NOT LIKE '%{WORD}%') NOT VALID")
    site.as_superuser(f"ALTER TABLE requests ADD CONSTRAINT bug CHECK (body NOT LIKE '%unloadable {WORD}%') NOT VALID")
    try:
        watched.start("worker", "-m", "echo", log_level="debug", **as_worker(site))
        watched.run("submit", write_canaries(tmp_path / "p.jsonl"), "-m", "echo")
        watched.run("submit", write_canaries(tmp_path / "q.jsonl", "unloadable"), "-m", "echo", code=None)
        until(lambda: _crashes(watched.mill), "the worker met it")
        watched.run("cancel", "last", code=None)
    finally:
        watched.end()
        site.as_superuser("ALTER TABLE outputs DROP CONSTRAINT bug")
        site.as_superuser("ALTER TABLE requests DROP CONSTRAINT bug")
    assert watched.leaks() == []


def _crashes(mill: Mill) -> int:
    with mill.store.database.read() as connection:
        return int(connection.scalar(text("SELECT count(*) FROM runs WHERE finished_at IS NOT NULL")) or 0)


@pytest.mark.parametrize("every_command", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nothing_is_said_of_them_when_servers_refuse_or_are_away(
    watched: Watched, site: Site, tmp_path: Path, every_command: bool
) -> None:
    prompts = write_canaries(tmp_path / "p.jsonl", count=5)
    right = site.broker_url("producer"), site.database_url("producer")
    wrong_port = [url.replace(f":{port}/", ":1/") for url, port in zip(right, _ports(site), strict=True)]
    wrong_scheme = right[0].replace("rediss://", "redis://"), right[1].replace("verify-full", "verify-fulll")
    unreadable = f"rediss://:{site.passwords['admin']}/x@localhost/0", "postgresql://u:p/" + site.passwords["admin"]
    plain = dict.fromkeys(("broker_ca_file",), "/none.pem")
    brokers = [wrong_port[0], wrong_scheme[0], unreadable[0], right[0] + "?ssl_cert_reqs=none", "http" + right[0]]
    brokers += [right[0].replace("producer:", "nobody:"), right[0].replace("/0", "/99")]
    databases = [wrong_port[1], wrong_scheme[1], unreadable[1], "mysql" + right[1], right[1].replace("/mill?", "/no?")]
    password = site.passwords["producer"]
    databases.append(right[1].replace(f":{password}@", "@") + f"&password={password}")
    databases += [right[1].replace("batchmill_producer:", "batchmill_nobody:"), site.database_url("reader")]
    commands = [("submit", prompts, "-m", "echo"), ("doctor",), ("jobs",), ("retry", "last")]
    changes = [*({"broker_url": url} for url in brokers), *({"database_url": url} for url in databases), plain]
    for change in changes:
        for words in commands if every_command else [("doctor",)]:
            watched.run(*words, code=None, log_level="debug", **change)
    for change in ({"broker_url": wrong_port[0]}, {"database_url": wrong_port[1]}, {"database_url": databases[2]}):
        watched.start("worker", "-m", "echo", "--exit-when-idle", "1", log_level="debug", **change)
    time.sleep(6)  # in which they try
    watched.end()
    assert watched.leaks() == []
    tracebacks = [said for said in watched.said if "Traceback" in said]
    assert tracebacks == []


def _ports(site: Site) -> tuple[int, int]:
    return site.redis_tls.port, site.postgresql_tls.port


BAD_LINES = [
    '{{"prompt": "{w}", "temprature": 1}}',
    '{{"prompt": "{w}',
    '{{"prompt": ["{w}"]}}',
    '"{w}"',
    '["{w}"]',
    "{w}",
    '{{"prompt": "{w}\\u0000"}}',
    '{{"prompt": "{w}\\ud800"}}',
    '{{"messages": [{{"role": "user", "content": ["{w}"]}}]}}',
    '{{"messages": "{w}"}}',
    '{{"prompt": "{w}", "prompt": "{w}"}}',
    '{{"prompt": "{w}", "messages": [{{"role": "user", "content": "{w}"}}]}}',
]


def test_nothing_is_said_of_the_prompts_of_a_bad_file(watched: Watched, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(line.format(w=f"{WORD}{secrets.token_hex(4)}") + "\n" for line in BAD_LINES))
    watched.run("submit", bad, "-m", "echo", code=2)
    assert watched.said[-1].count("bad.jsonl:") >= len(BAD_LINES)
    assert watched.leaks() == []
