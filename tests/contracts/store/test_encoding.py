"""The store holds any text, whatever the surroundings say, and a database that could not is refused."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from batchmill.jobs.store.leases.lease import BatchReport
from batchmill.jobs.store.store import Store
from tests.support.paths import ROOT
from tests.support.processes import forked
from tests.support.store import mill

TEXT = "\u00e9 \u4f60\u597d \U0001f600 \u2028 \x7f \uffff"


def command(url: str, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"BATCHMILL_DATABASE_URL": url, "PYTHONPATH": str(ROOT / "src")} | settings
    return forked.finished(words, env=environ)


@pytest.fixture(params=["LATIN1", "SQL_ASCII"])
def foreign_url(request: pytest.FixtureRequest, postgresql_server: str) -> Iterator[str]:
    """An empty database that does not hold every text."""
    server, name = make_url(postgresql_server), f"foreign_{request.param.lower()}"
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
        options = f"ENCODING '{request.param}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
        connection.execute(text(f"CREATE DATABASE {name} {options}"))
    yield server.set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


def test_a_database_that_cannot_hold_every_text_is_refused_in_one_line(foreign_url: str) -> None:
    done = command(foreign_url, "db", "upgrade")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "which does not keep every text; make another, `createdb --encoding=UTF8" in line
    store = Store(foreign_url)
    assert store.revision() is None
    store.close()
    looked = command(foreign_url, "doctor")
    assert looked.returncode == 1
    assert "`createdb --encoding=UTF8" in looked.stdout
    assert "Traceback" not in looked.stderr + looked.stdout


@pytest.mark.parametrize(
    "surroundings",
    [
        {"PGCLIENTENCODING": "LATIN1"},
        {"PGCLIENTENCODING": "SQL_ASCII"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
)
def test_every_text_comes_back_whatever_the_surroundings(
    store_url: str, tmp_path: Path, surroundings: dict[str, str]
) -> None:
    path = tmp_path / "p.txt"
    path.write_text(TEXT, encoding="utf-8")
    done = command(store_url, "submit", str(path), "-m", "echo", **surroundings)
    job_id = done.stdout.strip()
    assert job_id, done.stderr
    store = Store(store_url)
    who = mill.session(store)
    (claimed,) = mill.claim(store, who)
    assert [each.prompt for each in claimed.requests] == [TEXT]
    mill.save(store, who, [BatchReport(claimed.lease, outputs=[mill.output(job_id, 0, text=TEXT)])])
    for form in ("jsonl", "csv"):
        assert TEXT in command(store_url, "results", job_id, "--format", form, **surroundings).stdout
    store.close()


def test_an_upgrade_needs_no_encoding_of_the_surroundings(postgresql_url: str) -> None:
    done = command(postgresql_url, "db", "upgrade", PGCLIENTENCODING="LATIN1")
    assert done.returncode == 0, done.stderr


def test_a_sqlite_database_of_another_encoding_is_refused_since_it_changes_texts(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "s.db")) as connection:
        connection.execute("PRAGMA encoding = 'UTF-16'")
        connection.execute("CREATE TABLE theirs (x)")
    done = command(f"sqlite:///{tmp_path / 's.db'}", "db", "upgrade")
    assert done.returncode == 1
    assert "is encoded in UTF-16le, which does not keep every text; make another and name it" in done.stderr


def test_a_chat_template_of_any_text_is_seen_whatever_the_locale(sqlite_url: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_bytes('{"chat_template": "\u4f60 {{ messages }}"}'.encode())
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = command(sqlite_url, "submit", str(tmp_path / "p.jsonl"), "-m", str(tmp_path / "model"), **plain)
    assert done.returncode == 0, done.stderr
