"""The Celery app, queue names, and sending wake-ups; the broker's errors become BrokerUnavailable here.

A wake-up is one message with one batch id. It may be lost, doubled or late without harm, since the store decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from jobs.errors import BrokerUnavailable

#: The one task there is; its implementation lives in worker.app.
WAKE_TASK = "batchmill.wake"
#: A queue never holds more wake-ups than this.
MAX_WAKEUPS = 1_000
_KEY_PREFIX = "batchmill:"
_SOCKET_SECONDS = 10
_CONNECT_SECONDS = 5


def make_app(url: str, *, socket_seconds: float = _SOCKET_SECONDS) -> Celery:
    """A Celery app for this Redis. JSON only, early ack, no results, no remote control, no time limits."""
    app = Celery("batchmill", broker=url, set_as_current=False)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        result_backend=None,
        task_ignore_result=True,
        task_create_missing_queues=False,
        task_queues=[],
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        task_publish_retry_policy={
            "max_retries": 2,
            "interval_start": 0,
            "interval_step": 0.2,
            "interval_max": 1,
        },
        broker_connection_timeout=_CONNECT_SECONDS,
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "global_keyprefix": _KEY_PREFIX,
            "socket_timeout": socket_seconds,
            "socket_connect_timeout": _CONNECT_SECONDS,
            "socket_keepalive": not url.startswith("redis+socket"),
            "health_check_interval": 25,
        },
        worker_pool="prefork",
        worker_concurrency=1,
        worker_pool_start_method="spawn",
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_max_tasks_per_child=None,
    )
    return app


class Broker:
    """Sends wake-ups to the queues of Redis."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._app = make_app(url)

    @property
    def name(self) -> str:
        """The URL without user and password."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def send_wakeups(self, queue: str, batch_ids: Sequence[int]) -> int:
        """Sends wake-ups for pending batches, as many as the queue lacks: how many were sent.

        Raises BrokerUnavailable; some may have been sent then.
        """
        with self._translated(), self._app.connection_for_write() as connection:
            length = self._length(connection, queue)
            missing = batch_ids[: max(0, min(len(batch_ids), MAX_WAKEUPS) - length)]
            if missing:
                producer = self._app.amqp.Producer(connection, auto_declare=False)
                task = self._app.signature(WAKE_TASK)
                for batch_id in missing:
                    task.apply_async((batch_id,), queue=Queue(queue), producer=producer)
        return len(missing)

    def ping(self) -> None:
        """Raises BrokerUnavailable when Redis does not answer."""
        with self._translated(), self._app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=_CONNECT_SECONDS)

    def close(self) -> None:
        self._app.close()

    def _length(self, connection: Any, queue: str) -> int:
        connection.ensure_connection(max_retries=1, timeout=_CONNECT_SECONDS)
        return int(connection.default_channel.client.llen(queue))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (OperationalError, RedisError, OSError) as error:
            raise BrokerUnavailable(f"Redis at {self.name} is not reachable: {error}") from error
