"""A whole job under the users that deploy/ brings, through TLS; and what these users may not do."""

# ruff: noqa: F811  (imported fixtures)
from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest
import redis
from sqlalchemy import create_engine, text
from sqlalchemy.exc import ProgrammingError

from batchmill.jobs.broker.client import Broker, make_app
from batchmill.jobs.broker.embedded import find_server
from batchmill.jobs.errors import BrokerUnavailable, StoreUnavailable
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import metadata
from tests.integration.conftest import PATIENCE_SECONDS, Mill, until, write_prompts
from tests.support.servers.site import DEPLOY, ROLES_SQL, Site, site, site_mill  # noqa: F401
from tests.support.servers.tls_proxy import Authority

TABLES = sorted([*metadata.tables, "alembic_version"])


def test_a_whole_job_runs_under_these_users_and_through_tls(site_mill: Mill, site: Site, tmp_path: Path) -> None:
    as_worker = {"broker_url": site.broker_url("worker"), "database_url": site.database_url("worker")}
    site.client("admin").acl_log_reset()
    prompts = write_prompts(tmp_path / "p.jsonl", 400)
    served = site.redis_tls.served, site.postgresql_tls.served
    job_id = site_mill.command("submit", prompts, "-m", "echo", "--batch-size", "50").strip()
    assert site.client("admin").llen(f"batchmill:{site_mill.echo_queue}") == 8
    worker = site_mill.start("worker", "-m", "echo", echo_step_seconds=0.5, engine_rows=50, **as_worker)
    until(lambda: site_mill.succeeded(job_id) > 10, "some answers")
    site_mill.command("cancel", job_id)
    site_mill.command("wait", job_id, "--timeout", "300", code=5)
    site_mill.command("retry", job_id)
    site_mill.command("wait", job_id, "--timeout", "300")
    assert site_mill.status(job_id)["counts"]["succeeded"] == 400
    site_mill.command("doctor", code=0)
    by_reader = {"database_url": site.database_url("reader")}
    assert len(site_mill.command("results", job_id, **by_reader).splitlines()) == 400
    site_mill.command("status", job_id, **by_reader)
    site_mill.command("jobs", **by_reader)
    site_mill.command("workers", **by_reader)
    site_mill.command("db", "check", **by_reader)
    # A bad file deletes what was loaded of it; a dead submit is deleted by a worker.
    bad = tmp_path / "bad.jsonl"
    bad.write_text(prompts.read_text() + "{\n")
    site_mill.command("submit", bad, "-m", "echo", code=2)
    assert worker.poll() is None
    worker.terminate()
    said, _ = worker.communicate(timeout=PATIENCE_SECONDS)
    assert "Traceback" not in said
    assert worker.returncode == 0
    assert site.refused() == [], "nothing that batchmill asked of Redis was refused"
    assert site.redis_tls.served > served[0]
    assert site.postgresql_tls.served > served[1]


def test_a_crashed_worker_and_a_dead_submit_are_mended_under_these_users(
    site_mill: Mill, site: Site, tmp_path: Path
) -> None:
    as_worker = {"broker_url": site.broker_url("worker"), "database_url": site.database_url("worker")}
    site.client("admin").acl_log_reset()
    os.mkfifo(tmp_path / "fifo.jsonl")
    dead = site_mill.start("submit", tmp_path / "fifo.jsonl", "-m", "echo", loading_lease_seconds=1)
    with (tmp_path / "fifo.jsonl").open("w") as fifo:
        fifo.write('{"prompt": "a"}\n' * 5_000)
        fifo.flush()
        until(lambda: _loading(site_mill.store), "a submit that loads")
        dead.kill()
        dead.wait(PATIENCE_SECONDS)
    job_id = site_mill.command(
        "submit", "-", "-m", "echo", "--batch-size", "5", stdin='{"prompt": "!kill9"}\n' + '{"prompt": "a b"}\n' * 30
    ).strip()
    worker = site_mill.start("worker", "-m", "echo", chaos=True, **as_worker)
    site_mill.command("wait", job_id, "--timeout", "300", code=5)
    assert site_mill.status(job_id)["counts"] == {
        "total": 31,
        "succeeded": 30,
        "failed": 1,
        "cancelled": 0,
        "pending": 0,
    }
    until(lambda: not _loading(site_mill.store), "the dead submit is deleted")
    assert worker.poll() is None
    assert site.refused() == []


def _loading(store: Store) -> int:
    with store.database.read() as connection:
        return int(connection.scalar(text("SELECT count(*) FROM jobs WHERE state = 'loading'")) or 0)


def test_a_worker_may_put_back_what_another_left_unacknowledged(site: Site) -> None:
    """kombu does so once a minute or two, and when it ends."""
    url = f"redis://worker:{quote(site.passwords['worker'])}@localhost:{site.redis_port}/0"
    producing = Broker(f"redis://producer:{quote(site.passwords['producer'])}@localhost:{site.redis_port}/0")
    producing.send_wakeups("bm-restored", [1, 2])
    admin = site.client("admin")
    admin.acl_log_reset()
    with make_app(url).connection_for_read() as connection:
        channel = connection.default_channel
        for delivered in ("one", "two"):
            message = channel.Message(_popped(admin), channel=channel)
            channel.qos.append(message, delivered)
        assert admin.hlen("batchmill:unacked") == 2
        channel.qos.restore_by_tag("one")
        admin.zadd("batchmill:unacked_index", {"two": 0})
        channel.qos.restore_visible(interval=1)
        assert admin.llen("batchmill:bm-restored") == 2
        channel.qos.restore_unacked_once()
    assert site.refused() == []
    admin.flushall()


def _popped(admin: redis.Redis) -> dict[str, object]:
    found: dict[str, object] = json.loads(admin.rpop("batchmill:bm-restored"))  # type: ignore[arg-type]
    return found


FORBIDDEN_TO_BOTH = [
    *("FLUSHALL", "FLUSHDB", "KEYS *", "SCAN 0", "DBSIZE", "INFO", "SHUTDOWN NOSAVE", "DEBUG SLEEP 0", "SAVE"),
    *("CONFIG GET *", "CONFIG SET requirepass x", "ACL LIST", "ACL SETUSER producer on nopass", "MONITOR"),
    *("CLIENT LIST", "CLIENT KILL TYPE normal", "MODULE LIST", "REPLICAOF host 1", "SLOWLOG GET", "EVAL return(1) 0"),
    *("PUBLISH batchmill:/0.celery.pidbox {}", "SUBSCRIBE batchmill:x", "PSUBSCRIBE *", "SWAPDB 0 1", "TIME"),
    *("RENAME batchmill:bm-a batchmill:bm-b", "MIGRATE host 1 key 0 1", "RESTORE batchmill:bm-a 0 x", "SCRIPT FLUSH"),
    *("LPUSH other:bm-a x", "LPUSH celery x", "LLEN other", "LPUSH batchmill:other x"),
]
FORBIDDEN_TO_PRODUCERS = [
    *("DEL batchmill:bm-a", "RPOP batchmill:bm-a", "BRPOP batchmill:bm-a 1", "LRANGE batchmill:bm-a 0 -1"),
    *("LTRIM batchmill:bm-a 1 0", "SET batchmill:bm-a x", "EXPIRE batchmill:bm-a 1", "HGETALL batchmill:unacked"),
    *("LPUSH batchmill:unacked x", "LPUSH batchmill:_kombu.binding.celery x", "LLEN batchmill:unacked"),
    *("HGET batchmill:unacked a", "LPUSH batchmill:/0.celery.pidbox x"),
]


@pytest.mark.parametrize("user", ["producer", "worker"])
def test_users_of_redis_may_not_flush_nor_control_nor_look_elsewhere(site: Site, user: str) -> None:
    client = site.client(user)
    assert client.llen("batchmill:bm-a") == 0
    for command in FORBIDDEN_TO_BOTH + (FORBIDDEN_TO_PRODUCERS if user == "producer" else []):
        with pytest.raises(redis.ResponseError, match=r"NOPERM|no permissions|unknown subcommand") as caught:
            client.execute_command(*command.split())
        assert "unknown" not in str(caught.value), command
    client.close()


def test_redis_lets_nobody_in_without_a_users_password(site: Site) -> None:
    plain = redis.Redis(port=site.redis_port)
    with pytest.raises(redis.AuthenticationError):
        plain.ping()
    wrong = Broker(site.broker_url("producer", "wrongsecret"), ca_file=site.authority)
    with pytest.raises(BrokerUnavailable, match="correct BATCHMILL_BROKER_URL") as caught:
        wrong.ping()
    assert "wrongsecret" not in str(caught.value)


def test_a_users_file_whose_passwords_were_not_filled_in_does_not_start(tmp_path: Path) -> None:
    server = find_server()
    if server is None:
        pytest.skip("no redis-server is installed")
    listening = ["--port", "0", "--unixsocket", str(tmp_path / "redis.sock")]
    command = [str(server), *listening, "--aclfile", str(DEPLOY / "redis-users.acl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=tmp_path)
    assert done.returncode != 0
    assert "ACL errors" in done.stdout


@pytest.mark.parametrize("role", ["producer", "worker", "reader"])
def test_roles_of_postgresql_may_not_change_tables(site_mill: Mill, site: Site, role: str) -> None:
    statements = [
        "CREATE TABLE mine (a int)",
        "CREATE SCHEMA mine",
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE ROLE mine",
        "COPY jobs TO PROGRAM 'true'",
        "COPY jobs TO '/tmp/jobs'",
        "SELECT pg_read_file('postgresql.conf')",
        "UPDATE alembic_version SET version_num = '0'",
        "SET ROLE batchmill_migrator",
    ]
    for table in TABLES:
        statements += [
            f"ALTER TABLE {table} ADD COLUMN mine int",
            f"DROP TABLE {table}",
            f"TRUNCATE {table}",
            f"CREATE INDEX ON {table} ((1))",
            f"ALTER TABLE {table} DISABLE TRIGGER ALL",
        ]
    statements += FORBIDDEN_ROWS[role]
    refused(site, role, statements)


FORBIDDEN_ROWS = {
    "producer": ["UPDATE outputs SET payload = '[]'", "DELETE FROM runs", "UPDATE workers SET pid = 1"],
    "worker": [
        "DELETE FROM outputs",
        "UPDATE outputs SET payload = '[]'",
        "DELETE FROM runs",
        "DELETE FROM workers",
        "INSERT INTO jobs (id) VALUES ('a')",
        "INSERT INTO requests (job_id) VALUES ('a')",
    ],
    "reader": [f"DELETE FROM {table}" for table in TABLES]  # noqa: S608
    + ["UPDATE jobs SET state = 'queued'", "INSERT INTO jobs (id) VALUES ('a')", "SELECT * FROM jobs FOR UPDATE"],
}


def refused(site: Site, role: str, statements: list[str]) -> None:
    engine = create_engine(site.database_url(role))
    try:
        for statement in statements:
            with engine.connect() as connection, pytest.raises(ProgrammingError) as caught:
                connection.exec_driver_sql(statement)
            assert re.search(r"permission denied|must be owner|must be superuser", str(caught.value)), statement
    finally:
        engine.dispose()


def test_every_table_is_in_the_roles_file() -> None:
    rights = re.findall(r"\('batchmill_(\w+)', *'(\w+)', *'([A-Z, ]+)'\)", ROLES_SQL.read_text())
    for role in ("producer", "worker", "reader"):
        assert sorted(table for who, table, _ in rights if who == role) == TABLES
    assert {what for who, _, what in rights if who == "reader"} == {"SELECT"}


def test_postgresql_verifies_certificate_and_host_and_password(site_mill: Mill, site: Site, tmp_path: Path) -> None:
    other = Authority(tmp_path, "other")
    right = site.database_url("reader")
    for wrong, why in (
        (right.replace(str(site.authority), str(other.file)), "certificate verify failed"),
        (right.replace("localhost", "127.0.0.1"), "does not match host name"),
        (site.database_url("reader", "wrongsecret"), "password authentication failed"),
    ):
        store = Store(wrong)
        with pytest.raises(StoreUnavailable, match=why) as caught:
            store.revision()
        store.close()
        assert "wrongsecret" not in str(caught.value)
        assert site.passwords["reader"] not in str(caught.value)
