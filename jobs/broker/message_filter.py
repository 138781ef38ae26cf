"""The filter between Redis and Celery: of all that a queue may hold, wake-ups alone pass, each made anew.

A message in Redis may be forged, so nothing of it but a batch's id is handed on: no other task, no pickle, no
compressed body, no time limit, no link to another message. It knows the form of Celery's messages and of kombu's
envelopes, and neither what a batch is nor who claims it.
"""

from __future__ import annotations

import base64
import functools
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from kombu.transport import redis, virtual
from redis.exceptions import ConnectionError, ResponseError

from batchmill.jobs.runtime.logs import get_logger

log = get_logger(__name__)
#: The one task there is; its implementation lives in worker.process.app.
WAKE_TASK = "batchmill.wake"
#: The class below as kombu's table of transports names it.
TRANSPORT = f"{__name__}:Transport"
#: A wake-up has about 1 KiB.
_MOST_BYTES = 16 * 1024
_LARGEST_ID = 2**63 - 1
_JSON = ("application/json", "utf-8", "base64")


class NoWakeUp(Exception):
    """A message that is not a wake-up; its text says why, and quotes nothing of it."""


def batch_id_of(item: bytes) -> int:
    """The batch that this message names. Raises NoWakeUp."""
    if len(item) > _MOST_BYTES:
        raise NoWakeUp(f"it has more than {_MOST_BYTES:,} bytes")
    envelope = _mapping(_parsed(item), "the message")
    headers, properties = (_mapping(envelope.get(name), name) for name in ("headers", "properties"))
    written = (envelope.get("content-type"), envelope.get("content-encoding"), properties.get("body_encoding"))
    if written != _JSON or headers.get("compression"):
        raise NoWakeUp("its content is not plain JSON")
    if headers.get("task") != WAKE_TASK:
        raise NoWakeUp("it names another task")
    return _only_argument(envelope.get("body"))


def made_anew(batch_id: int, queue: str) -> bytes:
    """A wake-up of this batch as Celery takes it, with nothing in it that came from outside."""
    task_id = str(uuid.uuid4())
    message = {
        "body": base64.b64encode(json.dumps([[batch_id], {}, {}]).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": WAKE_TASK, "id": task_id, "lang": "py"},
        "properties": {
            "body_encoding": "base64",
            "correlation_id": task_id,
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
        },
    }
    return json.dumps(message).encode()


class _Client(redis.PrefixedStrictRedis):  # type: ignore[misc]
    """Filters the replies to BRPOP before kombu parses them."""

    def parse_response(self, connection: Any, command_name: str, **options: Any) -> Any:
        if command_name != "BRPOP":
            return super().parse_response(connection, command_name, **options)
        with _lost_when_refused():
            answer = super().parse_response(connection, command_name, **options)
        if not answer:
            return None
        key, item = answer
        # Behind the separator stands the priority, for which a queue has a key each.
        queue = key.decode().partition(redis.Channel.sep)[0]
        try:
            return key, made_anew(batch_id_of(item), queue)
        except NoWakeUp as error:
            log.warning("a message that is no wake-up was dropped", queue=queue, reason=str(error))
            return None  # as if the wait had timed out


class _QoS(redis.QoS):  # type: ignore[misc]
    """kombu's count of deliveries without an acknowledgement; a failed acknowledgement is taken off it, too.

    Otherwise a connection that breaks between the two would leave the count at its limit, and a worker that waits for
    its next wake-up on another connection, which did not break, would never take one again.
    """

    def ack(self, delivery_tag: str) -> None:
        try:
            self._remove_from_indices(delivery_tag).execute()
        finally:
            virtual.QoS.ack(self, delivery_tag)


class Channel(redis.Channel):  # type: ignore[misc]
    """kombu's channel, with the filter in front of what it consumes."""

    QoS: ClassVar[type[_QoS]] = _QoS

    def _get_client(self) -> functools.partial[_Client]:
        return functools.partial(_Client, global_keyprefix=self.global_keyprefix)

    def _size(self, queue: str) -> Any:
        with _lost_when_refused():
            return super()._size(queue)


class Transport(redis.Transport):  # type: ignore[misc]
    """kombu's transport with such channels; only the newest is registered in this process's event loop.

    kombu never unregisters a lost connection: its timers and tick callbacks would run for ever, and more of them after
    each reconnect.
    """

    Channel: ClassVar[type[Channel]] = Channel
    _registered: ClassVar[Transport | None] = None

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        if Transport._registered is not None:
            Transport._registered._leave(loop)
        before = set(loop.on_tick)
        super().register_with_event_loop(connection, loop)
        self._ticks = loop.on_tick - before
        Transport._registered = self

    def _leave(self, loop: Any) -> None:
        loop.on_tick.difference_update(self._ticks)
        for name, timer in vars(self.cycle).items():
            if name.endswith("_tref") and timer is not None:
                timer.cancel()


@contextmanager
def _lost_when_refused() -> Iterator[None]:
    """Turns a refusal of Redis (a key of another type, or a server that became a replica) into a lost connection.

    Celery connects again after a lost connection, and would end the worker for anything else.
    """
    try:
        yield
    except ResponseError as error:
        raise ConnectionError(f"Redis refuses to hand out wake-ups: {error}") from error


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):  # which are bad UTF-8, bad JSON, endless digits and deep nesting
        raise NoWakeUp("it is not JSON") from None


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise NoWakeUp(f"{name} is no JSON object")
    return value


def _only_argument(body: Any) -> int:
    try:
        decoded = base64.b64decode(body, validate=True)
    except (TypeError, ValueError):
        raise NoWakeUp("its body is not base64") from None
    match _parsed(decoded):
        case [[batch_id], keywords, *_] if type(batch_id) is int and keywords == {} and 0 < batch_id <= _LARGEST_ID:
            return batch_id
    raise NoWakeUp("its arguments are not one id")
