"""The Redis of the settings: valid URLs, and the certificates that it trusts under TLS."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from kombu.asynchronous import Hub

from batchmill.jobs.broker.client import Broker, make_app
from batchmill.jobs.broker.embedded import EmbeddedRedis
from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.errors import BrokerUnavailable, SettingsError
from tests.support.servers.tls_proxy import Authority, TlsProxy, to_socket


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[Path]:
    """The socket of a plain Redis."""
    home = tmp_path / "home"
    home.mkdir()
    server = EmbeddedRedis(home)
    server.start()
    yield home / "redis.sock"
    server.stop()


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("redis://:secret@host:6379/0", "redis://host:6379/0"),
        ("rediss://user:se:cr@et@host/0?virtual_host=secret", "rediss://host/0"),
        ("redis+socket:///folder/redis.sock", "redis+socket:///folder/redis.sock"),
    ],
)
def test_the_name_has_no_password(url: str, name: str) -> None:
    assert Broker(url).name == name


@pytest.mark.parametrize("url", ["redis://:sec/ret@host/0", "redis://:sec#ret@host/0", "redis://:secret@[host/0"])
def test_a_url_that_cannot_be_read_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(SettingsError, match=r"write the special characters of a password as %XX") as caught:
        Broker(url)
    assert "sec" not in str(caught.value)
    assert caught.value.__suppress_context__, "no traceback shows it either"


@pytest.mark.parametrize("option", ["ssl_cert_reqs=none", "ssl_check_hostname=false", "ssl_ca_certs=", "ssl=true"])
def test_ssl_options_in_the_url_are_refused_with_the_settings_to_use(option: str) -> None:
    with pytest.raises(SettingsError, match=r"leave ssl options out.*broker_ca_file and broker_insecure"):
        Broker(f"rediss://:secret@host/0?{option}")


@pytest.mark.parametrize("flags", [{"ca_file": Path("ca.pem")}, {"insecure": True}])
@pytest.mark.parametrize("url", ["redis://host/0", "redis+socket:///redis.sock"])
def test_settings_of_tls_without_tls_are_refused(url: str, flags: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="need a broker_url that begins with rediss://"):
        make_app(url, **flags)  # type: ignore[arg-type]


def test_a_ca_file_that_is_not_there_is_named() -> None:
    with pytest.raises(SettingsError, match=r"broker_ca_file: there is no file /none\.pem"):
        make_app("rediss://host/0", ca_file=Path("/none.pem"))


def test_certificates_are_verified_unless_told_otherwise_by_name(tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    ca_file.touch()
    verified = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}
    assert make_app("rediss://host/0").conf.broker_use_ssl == verified
    assert make_app("rediss://host/0", ca_file=ca_file).conf.broker_use_ssl == verified | {"ssl_ca_certs": str(ca_file)}
    insecure = make_app("rediss://host/0", insecure=True).conf.broker_use_ssl
    assert insecure == {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False}


def test_rediss_trusts_a_named_authority_alone_and_checks_the_host(socket: Path, tmp_path: Path) -> None:
    mine, other = Authority(tmp_path, "mine"), Authority(tmp_path, "other")
    with TlsProxy(to_socket(socket), mine.context("localhost")) as proxy:
        url = f"rediss://localhost:{proxy.port}/0"
        Broker(url, ca_file=mine.file).ping()
        assert Broker(url, ca_file=mine.file).send_wakeups("bm-echo", [1, 2]) == 2
        Broker(url, insecure=True).ping()
        Broker.of(load_settings(broker_url=url, broker_ca_file=mine.file)).ping()
        served = proxy.served
        for untrusting in (Broker(url), Broker(url, ca_file=other.file)):
            with pytest.raises(BrokerUnavailable, match="name who signed its certificate by BATCHMILL_BROKER_CA_FILE"):
                untrusting.ping()
        with pytest.raises(BrokerUnavailable, match="name the host as its certificate does"):
            Broker(f"rediss://127.0.0.1:{proxy.port}/0", ca_file=mine.file).ping()
        with pytest.raises(BrokerUnavailable):
            Broker(f"redis://localhost:{proxy.port}/0").ping()
        assert proxy.served == served, "not a word went to Redis"
    with redis.Redis(unix_socket_path=str(socket)) as client:
        assert client.llen("batchmill:bm-echo") == 2


def test_a_wrong_password_is_one_line_without_it(socket: Path) -> None:
    with redis.Redis(unix_socket_path=str(socket)) as client:
        client.config_set("requirepass", "right")
    with pytest.raises(BrokerUnavailable) as caught:
        Broker(f"redis+socket://:wrongsecret@{socket}").ping()
    assert "wrongsecret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lost_connection_leaves_nothing_in_the_event_loop(socket: Path) -> None:
    """Its timers and its share of each tick would run for ever, and more of them after each loss."""
    app = make_app(f"redis+socket://{socket}")
    hub = Hub()
    for _ in range(5):
        connection = app.connection_for_read()
        connection.ensure_connection()
        connection.transport.register_with_event_loop(connection.connection, hub)
        connection.collect()  # as Celery does with one that was lost
    assert len(hub.on_tick) == 1
    alive = [each.entry for each in hub.timer._queue if not each.entry.canceled]
    assert len(alive) == len(set(map(id, alive))) == 5  # kombu's own, of the last connection
    hub.close()
    app.close()


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("maxmemory", "1", "refuses writes: .* used memory > 'maxmemory'; raise its maxmemory"),
        ("replicaof", "127.0.0.1 1", "refuses writes: .* read only replica; name the one that it copies"),
    ],
)
def test_a_redis_that_takes_no_writes_is_told_of_and_nothing_is_written(
    socket: Path, setting: str, value: str, said: str
) -> None:
    broker = Broker(f"redis+socket://{socket}")
    with redis.Redis(unix_socket_path=str(socket)) as client:
        broker.check_writes("bm-echo")
        assert client.keys() == []
        client.execute_command("REPLICAOF", *value.split()) if setting == "replicaof" else client.config_set(
            setting, value
        )
        with pytest.raises(BrokerUnavailable, match=said):
            broker.check_writes("bm-echo")
    broker.close()
