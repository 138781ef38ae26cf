"""A TCP proxy that fails on demand, in front of Redis or PostgreSQL: what a network does to a connection.

It listens on 127.0.0.1 and runs in a thread of its own; every method may be called from any thread while it runs and
holds until `heal`. It knows nothing of what it carries.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

#: The server's address: a unix socket, or host and port.
Target = Path | tuple[str, int]
_CHUNK_BYTES = 64 * 1024
_CALL_SECONDS = 10.0


@dataclass(slots=True)
class _Cut:
    """The next reply with these bytes in it is the last of its connection."""

    containing: bytes
    deliver: bool
    done: threading.Event


class FaultProxy:
    """One server's stand-in; `port` stays the same over `refuse` and `heal`."""

    def __init__(self, target: Target) -> None:
        self.port = 0
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._listener: asyncio.Server | None = None
        self._flowing = asyncio.Event()
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._latency_seconds = 0.0
        self._cut: _Cut | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self._flowing.set()
        self._await(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._await(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def connections(self) -> int:
        """The number of connections that are open at either side."""
        return len(self._open)

    def blackhole(self) -> None:
        """Connections stay open and are still accepted, and nothing passes: both sides are half-open."""
        self._call(self._flowing.clear)

    def reset(self) -> None:
        """Every connection of now ends with RST; new ones are served."""
        self._call(self._abort_all)

    def cut_after_reply(self, *, containing: bytes = b"", deliver: bool = False) -> threading.Event:
        """Ends a connection right after the server's next reply; what is returned is set when it has happened.

        `containing`: the reply has these bytes in it. `deliver`: the client still gets the reply; else it is lost, as
        if the connection had been cut on the way.
        """
        cut = _Cut(containing, deliver, threading.Event())

        def arm() -> None:
            self._cut = cut

        self._call(arm)
        return cut.done

    def latency(self, seconds: float) -> None:
        """Everything is so late, in both directions."""

        def slow() -> None:
            self._latency_seconds = seconds

        self._call(slow)

    def refuse(self) -> None:
        """Nobody listens, and every connection of now ends with RST."""
        self._await(self._close())
        self.reset()

    def heal(self) -> None:
        """Everything passes again; what waited in a blackhole goes on its way."""

        def mend() -> None:
            self._latency_seconds = 0.0
            self._cut = None
            self._flowing.set()

        self._call(mend)
        self._await(self._listen())

    # --- what follows runs in the loop's thread ---------------------------------------------------------------

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._listener.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _end(self) -> None:
        await self._close()
        self._abort_all()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._open.add(writer)
        there: asyncio.StreamWriter | None = None
        try:
            await self._flowing.wait()
            answers, there = await self._connect()
            self._open.add(there)
            await asyncio.gather(self._pump(reader, there), self._pump(answers, writer, cuttable=True))
        except OSError:
            pass  # one side has gone, so the other goes too
        except asyncio.CancelledError:
            return
        finally:
            for each in (writer, there):
                if each is not None:
                    self._abort(each)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self._target, Path):
            return await asyncio.open_unix_connection(self._target)
        return await asyncio.open_connection(*self._target)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, cuttable: bool = False
    ) -> None:
        """Carries one direction to its end. Raises OSError."""
        while data := await reader.read(_CHUNK_BYTES):
            if self._latency_seconds:
                await asyncio.sleep(self._latency_seconds)
            await self._flowing.wait()
            cut = self._cut
            if cuttable and cut is not None and cut.containing in data:
                await self._cut_off(writer, data, cut)
            writer.write(data)
            await writer.drain()
        await self._flowing.wait()
        with suppress(OSError, RuntimeError):
            writer.write_eof()

    async def _cut_off(self, writer: asyncio.StreamWriter, data: bytes, cut: _Cut) -> None:
        self._cut = None
        if cut.deliver:
            writer.write(data)
            await writer.drain()
            writer.write_eof()
        cut.done.set()
        raise ConnectionResetError("cut by the test")

    def _abort_all(self) -> None:
        for writer in list(self._open):
            self._abort(writer)

    def _abort(self, writer: asyncio.StreamWriter) -> None:
        """Closes with RST, unless it has been closed."""
        self._open.discard(writer)
        if not writer.transport.is_closing():
            with suppress(OSError):
                raw: socket.socket = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    # --- and this in the caller's ---------------------------------------------------------------------------

    def _call(self, change: Callable[[], None]) -> None:
        async def run() -> None:
            change()

        self._await(run())

    def _await(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_SECONDS)
