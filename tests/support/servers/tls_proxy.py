"""A TCP proxy that speaks TLS outside and plain inside, for servers that were built without TLS.

It answers PostgreSQL's SSLRequest, too, after which such a client begins its handshake.
"""

from __future__ import annotations

import asyncio
import ssl
import struct
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import trustme

#: PostgreSQL's SSLRequest: its length, and the code that stands in place of a version.
_SSL_REQUEST = struct.pack("!II", 8, 80877103)
_BLOCK_BYTES = 64 * 1024

Dial = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class Authority:
    """Signs certificates; `file` is its own, for clients."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._signer = trustme.CA()
        self.file = folder / f"{name}.pem"
        self._signer.cert_pem.write_to_path(self.file)

    def context(self, host: str) -> ssl.SSLContext:
        """The TLS context of a server of this name."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._signer.issue_cert(host).configure_cert(context)
        return context


def to_port(port: int) -> Dial:
    """Forwards to a port of this machine."""
    return lambda: asyncio.open_connection("127.0.0.1", port)


def to_socket(path: Path | str) -> Dial:
    """Forwards to a unix socket."""
    return lambda: asyncio.open_unix_connection(path)


class TlsProxy:
    """Listens on 127.0.0.1 while it is entered, on `port`; `served` counts the connections that spoke TLS."""

    def __init__(self, dial: Dial, context: ssl.SSLContext, *, postgresql: bool = False) -> None:
        self._dial = dial
        self._context = context
        self._postgresql = postgresql
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="TLS proxy", daemon=True)
        self._open: set[asyncio.Task[None]] = set()
        self.port = 0
        self.served = 0

    def __enter__(self) -> TlsProxy:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        at_once = None if self._postgresql else self._context
        return await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=at_once)

    async def _end(self) -> None:
        self._server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # a client that trusts nobody, or one that went away
        finally:
            self._open.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._postgresql:
            if await reader.readexactly(len(_SSL_REQUEST)) != _SSL_REQUEST:
                return  # a client that would go on without TLS
            writer.write(b"S")
            await writer.start_tls(self._context)
        self.served += 1
        inner_reader, inner_writer = await self._dial()
        try:
            await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))
        finally:
            inner_writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while block := await reader.read(_BLOCK_BYTES):
            writer.write(block)
            await writer.drain()
    writer.close()
