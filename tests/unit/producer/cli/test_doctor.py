"""`batchmill doctor`: the checks of a home, and arguments that it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis
from click.testing import CliRunner
from sqlalchemy.engine import make_url

from batchmill.jobs.broker.client import Broker
from batchmill.jobs.broker.embedded import EmbeddedRedis
from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.runtime.home import socket_path, use_store
from batchmill.producer.cli import doctor
from batchmill.producer.cli.doctor import Check, examine
from batchmill.producer.cli.main import cli


@pytest.fixture(autouse=True)
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch is asked in a process of its own, which takes seconds."""
    monkeypatch.setattr(doctor, "_libraries", lambda: iter(()))


def check(settings: Settings, name: str) -> Check:
    return next(each for each in examine(settings, model="demo") if each.name == name)


def test_a_new_home_needs_no_store_and_gets_none(tmp_path: Path) -> None:
    checked = check(Settings(home=tmp_path), "database")
    assert (checked.ok, checked.found) == (True, f"embedded, created at first use in {tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_gone_from_under_those_at_work_on_it_fails(tmp_path: Path) -> None:
    with use_store(tmp_path):
        checked = check(Settings(home=tmp_path), "database")
    assert not checked.ok
    assert checked.found.startswith(f"the store of {tmp_path} is gone, and a worker, `run` or `up` is still at work")
    assert "put its file back, or end them" in checked.found
    assert check(Settings(home=tmp_path), "database").ok


def test_no_redis_is_waited_for_that_nobody_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ping(_: Broker) -> None:
        raise AssertionError

    monkeypatch.setattr(Broker, "ping", ping)
    checked = check(Settings(home=tmp_path), "redis")
    assert checked.found.startswith("embedded, not running; server: ")


def test_a_redis_that_takes_no_writes_fails(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    try:
        with redis.Redis(unix_socket_path=str(socket_path(tmp_path))) as client:
            assert check(Settings(home=tmp_path), "redis").ok
            client.config_set("maxmemory", "1")
            checked = check(Settings(home=tmp_path), "redis")
            assert client.keys() == []
    finally:
        server.stop()
    assert not checked.ok
    assert "refuses writes: " in checked.found
    assert "maxmemory" in checked.found


def test_a_store_that_takes_no_writes_fails(tmp_path: Path, postgresql_url: str) -> None:
    url = make_url(postgresql_url)
    settings = {
        name: Settings(home=tmp_path, database_url=at.render_as_string(hide_password=False))
        for name, at in (
            ("writes", url),
            ("reads", url.update_query_dict({"options": "-c default_transaction_read_only=on"})),
        )
    }
    assert check(settings["writes"], "database").ok
    checked = check(settings["reads"], "database")
    assert not checked.ok
    assert checked.found.endswith("is read-only: name the server that writes")


class TestCommand:
    def test_a_model_goes_without_a_job(self) -> None:
        done = CliRunner().invoke(cli, ["doctor", "last", "-m", "echo"])
        assert done.exit_code == 2
        assert "leave --model out" in done.output

    def test_no_such_job_is_exit_3(self) -> None:
        assert CliRunner().invoke(cli, ["doctor", "nosuchjob"]).exit_code == 3
