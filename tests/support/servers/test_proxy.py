"""The fault proxy does to a connection what its methods say."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from time import monotonic

import pytest

from tests.integration.conftest import PATIENCE_SECONDS
from tests.support.servers.proxy import FaultProxy

#: A client waits so long for what must not come.
SHORT_SECONDS = 0.2


@pytest.fixture
def echo_port() -> Iterator[int]:
    """A server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def answer(connection: socket.socket) -> None:
    with connection:
        try:
            while data := connection.recv(1_000):
                connection.sendall(data)
        except OSError:
            return


@pytest.fixture
def proxy(echo_port: int) -> Iterator[FaultProxy]:
    with FaultProxy(("127.0.0.1", echo_port)) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[socket.socket]:
    with connected(proxy) as client:
        assert said(client, b"hello") == b"hello"
        yield client


def connected(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def said(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    return client.recv(1_000)


def test_a_blackhole_keeps_connections_and_carries_on_when_healed(proxy: FaultProxy, client: socket.socket) -> None:
    proxy.blackhole()
    with connected(proxy) as other:
        for each in (client, other):
            each.settimeout(SHORT_SECONDS)
            with pytest.raises(TimeoutError):
                said(each, b"lost?")
        proxy.heal()
        for each in (client, other):
            each.settimeout(5)
            assert each.recv(1_000) == b"lost?"


def test_a_reset_ends_every_connection_of_now(proxy: FaultProxy, client: socket.socket) -> None:
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        client.recv(1_000)
    with connected(proxy) as other:
        assert said(other, b"again") == b"again"


def say_until_told(client: socket.socket, word: bytes) -> None:
    """The end of a connection is told of at the next use, or at one after it."""
    for _ in range(100):
        said(client, word)
        time.sleep(0.01)


@pytest.mark.parametrize("deliver", [False, True])
def test_a_cut_after_a_reply_loses_it_or_not(deliver: bool, proxy: FaultProxy, client: socket.socket) -> None:
    done = proxy.cut_after_reply(containing=b"last", deliver=deliver)
    assert said(client, b"first") == b"first"
    assert not done.is_set()
    if deliver:
        assert said(client, b"last") == b"last"
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        say_until_told(client, b"more" if deliver else b"last")
    assert done.wait(PATIENCE_SECONDS)
    with connected(proxy) as other:
        assert said(other, b"last") == b"last"  # it happens once


def test_latency_delays_both_ways(proxy: FaultProxy, client: socket.socket) -> None:
    proxy.latency(SHORT_SECONDS)
    begin = monotonic()
    assert said(client, b"slow") == b"slow"
    assert monotonic() - begin >= 2 * SHORT_SECONDS
    proxy.heal()
    begin = monotonic()
    assert said(client, b"fast") == b"fast"
    assert monotonic() - begin < SHORT_SECONDS


def test_refused_connections_are_served_again_on_the_same_port(proxy: FaultProxy, client: socket.socket) -> None:
    port = proxy.port
    proxy.refuse()
    with pytest.raises(ConnectionResetError):
        client.recv(1_000)
    with pytest.raises(ConnectionRefusedError):
        connected(proxy)
    proxy.heal()
    assert proxy.port == port
    with connected(proxy) as other:
        assert said(other, b"back") == b"back"


def test_a_server_that_is_away_resets_the_client(echo_port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with FaultProxy(("127.0.0.1", port)) as proxy, pytest.raises(ConnectionResetError), connected(proxy) as client:
        said(client, b"anyone?")


def test_an_end_of_one_side_reaches_the_other(proxy: FaultProxy, client: socket.socket) -> None:
    client.sendall(b"bye")
    client.shutdown(socket.SHUT_WR)
    assert client.recv(1_000) == b"bye"
    assert client.recv(1_000) == b""
