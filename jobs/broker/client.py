"""The Celery app, queue names, and sending wake-ups; the broker's errors become BrokerUnavailable here.

A wake-up is one message with one batch id. It may be lost, doubled or late without harm, since the store decides.
What a worker takes out of a queue passes jobs.broker.message_filter first.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from celery import Celery
from celery.loaders.app import AppLoader
from kombu import Queue
from kombu.exceptions import OperationalError
from kombu.transport import TRANSPORT_ALIASES
from redis.exceptions import RedisError

from batchmill.jobs.broker.message_filter import TRANSPORT, WAKE_TASK
from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.errors import BrokerUnavailable, SettingsError
from batchmill.jobs.runtime.failpoints import failpoint
from batchmill.jobs.runtime.waiting import telling

#: A queue never holds more wake-ups than this.
MAX_WAKEUPS = 1_000
_KEY_PREFIX = "batchmill:"
_SOCKET_SECONDS = 10
_CONNECT_SECONDS = 5
#: The pause between the two attempts to reach Redis; kombu alone would wait for 2 s.
_RETRY_SECONDS = 0.2
#: The remedies for some errors, by words of their texts; the first match is told.
_REMEDIES = {
    "mismatch, certificate is not valid": "; name the host as its certificate does",
    "CERTIFICATE_VERIFY_FAILED": "; name who signed its certificate by BATCHMILL_BROKER_CA_FILE",
    "invalid username-password pair": "; correct BATCHMILL_BROKER_URL",
    "NOPERM": "; its user lacks a right that deploy/redis-users.acl gives",
}
#: The remedies for a Redis that answers and refuses writes, by words of its error.
_REFUSALS = {
    "used memory > 'maxmemory'": "; raise its maxmemory, or give batchmill a Redis of its own",
    "read only replica": "; name the one that it copies by BATCHMILL_BROKER_URL",
    "MISCONF": "; its log says why it cannot save to its disk",
}
_TLS = "rediss"
_SOCKET = "redis+socket"


#: JSON only, early acknowledgement, no results.
_TASKS = {
    "task_serializer": "json",
    "accept_content": ["json"],
    "result_backend": None,
    "task_ignore_result": True,
    "task_create_missing_queues": False,
    "task_queues": [],
    "task_acks_late": False,
    "task_reject_on_worker_lost": False,
    "task_publish_retry_policy": {"max_retries": 2, "interval_start": 0, "interval_step": 0.2, "interval_max": 1},
}
#: One spawned process that keeps its model; no remote control, no events.
_WORKER = {
    "worker_pool": "prefork",
    "worker_concurrency": 1,
    "worker_pool_start_method": "spawn",
    "worker_prefetch_multiplier": 1,
    "worker_disable_prefetch": True,
    # Concerns late acknowledgement alone, which is off; unset, Celery warns at each lost connection.
    "worker_cancel_long_running_tasks_on_connection_loss": True,
    "worker_enable_remote_control": False,
    "worker_send_task_events": False,
    "worker_hijack_root_logger": False,
    "worker_redirect_stdouts": False,
    "worker_max_tasks_per_child": None,
}


def make_app(
    url: str, *, socket_seconds: float = _SOCKET_SECONDS, ca_file: Path | None = None, insecure: bool = False
) -> Celery:
    """A Celery app for this Redis. JSON only, early ack, no results, no remote control, no time limits.

    With rediss:// the certificate and its host name are verified: against `ca_file` and the system's authorities,
    or not at all if `insecure`. Raises SettingsError.
    """
    scheme = _scheme(url)
    # Every connection of this process passes the message filter. kombu has no setting for that where the URL names the
    # transport.
    TRANSPORT_ALIASES.update(redis=TRANSPORT, rediss=TRANSPORT)
    app = Celery("batchmill", broker=url, loader=Loader, fixups=(), set_as_current=False)
    app.conf.update(_TASKS)
    app.conf.update(_WORKER)
    app.conf.update(
        broker_use_ssl=_verification(scheme, ca_file, insecure),
        broker_connection_timeout=_CONNECT_SECONDS,
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "global_keyprefix": _KEY_PREFIX,
            "socket_timeout": socket_seconds,
            "socket_connect_timeout": _CONNECT_SECONDS,
            "socket_keepalive": scheme != _SOCKET,
            "health_check_interval": 25,
        },
    )
    _forget_builtin_tasks(app)
    return app


class Loader(AppLoader):  # type: ignore[misc]
    """Imports the modules that the app names like any other; Celery's own loaders look in the current folder first.

    The app is given this class and not its name, since Celery would look that up in the current folder, too.
    """

    def import_from_cwd(self, module: str, imp: Any = None, package: str | None = None) -> ModuleType:
        return import_module(module, package)


class Broker:
    """Sends wake-ups to the queues of Redis."""

    def __init__(self, url: str, *, ca_file: Path | None = None, insecure: bool = False) -> None:
        self._url = url
        self._app = make_app(url, ca_file=ca_file, insecure=insecure)

    @classmethod
    def of(cls, settings: Settings) -> Broker:
        """The Redis of these settings. Raises SettingsError."""
        return cls(settings.broker, ca_file=settings.broker_ca_file, insecure=settings.broker_insecure)

    @property
    def name(self) -> str:
        """The URL without user, password and options."""
        scheme, _, rest = self._url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"

    def send_wakeups(self, queue: str, batch_ids: Sequence[int]) -> int:
        """Sends as many wake-ups for pending batches as the queue lacks, and returns their number.

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
                    failpoint("wakeup.sent")
        return len(missing)

    def length(self, queue: str) -> int:
        """The number of wake-ups in a queue. Raises BrokerUnavailable."""
        with self._translated(), self._app.connection_for_write() as connection:
            return self._length(connection, queue)

    def check_writes(self, queue: str) -> None:
        """Raises BrokerUnavailable where Redis would refuse a wake-up; the push is queued and never executed."""
        with self._translated(), self._app.connection_for_write() as connection:
            pool = self._connected(connection).connection_pool
            link = pool.get_connection()
            try:
                for words in (("MULTI",), ("LPUSH", f"{_KEY_PREFIX}{queue}", "")):
                    link.send_command(*words)
                    link.read_response()
            finally:
                link.disconnect()
                pool.release(link)

    def delete(self, queue: str) -> None:
        """Deletes a queue with all that lies in it. Raises BrokerUnavailable."""
        with self._translated(), self._app.connection_for_write() as connection:
            self._connected(connection).delete(queue)

    def mark(self, store_id: str, text: str, *, seconds: int) -> str | None:
        """Leaves a mark under a store's id for so long, and returns the one before it. Raises BrokerUnavailable."""
        key = f"bm-store-{store_id}"
        with self._translated(), self._app.connection_for_write() as connection:
            client = self._connected(connection)
            # kombu puts the prefix before the keys of its own commands alone
            before = client.get(f"{_KEY_PREFIX}{key}")
            client.set(key, text, ex=seconds)
        return None if before is None else before.decode(errors="replace")

    def ping(self) -> None:
        """Raises BrokerUnavailable when Redis does not answer."""
        with self._translated(), self._app.connection_for_write() as connection:
            self._connected(connection)

    def close(self) -> None:
        self._app.close()

    def _length(self, connection: Any, queue: str) -> int:
        return int(self._connected(connection).llen(queue))

    def _connected(self, connection: Any) -> Any:
        connection.ensure_connection(max_retries=1, interval_start=_RETRY_SECONDS, timeout=_CONNECT_SECONDS)
        return connection.default_channel.client

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            with telling(f"Redis at {self.name}"):
                yield
        except (OperationalError, RedisError, OSError) as error:
            text = str(error)
            refused, unreached = _fitting(_REFUSALS, text), _fitting(_REMEDIES, text)
            what = f"refuses writes: {text.rstrip('.')}{refused}" if refused else f"is not reachable: {text}{unreached}"
            raise BrokerUnavailable(f"Redis at {self.name} {what}") from error


def _fitting(remedies: dict[str, str], text: str) -> str:
    return next((remedy for words, remedy in remedies.items() if words in text), "")


def _scheme(url: str) -> str:
    """The URL's scheme. Raises SettingsError for a malformed URL; the error does not quote its password."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise SettingsError(
            "BATCHMILL_BROKER_URL cannot be read; write the special characters of a password as %XX"
        ) from None
    if any(name.startswith("ssl") for name, _ in parse_qsl(parts.query, keep_blank_values=True)):
        raise SettingsError(
            "BATCHMILL_BROKER_URL: leave ssl options out; rediss:// verifies certificates, and the settings "
            "broker_ca_file and broker_insecure say how"
        )
    return parts.scheme


def _verification(scheme: str, ca_file: Path | None, insecure: bool) -> dict[str, Any] | None:
    """The TLS options of redis-py; None without TLS."""
    if scheme != _TLS:
        if ca_file is not None or insecure:
            raise SettingsError("broker_ca_file and broker_insecure need a broker_url that begins with rediss://")
        return None
    if insecure:
        return {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False}
    if ca_file is not None and not ca_file.is_file():
        raise SettingsError(f"broker_ca_file: there is no file {ca_file}")
    authorities = {} if ca_file is None else {"ssl_ca_certs": str(ca_file)}
    return {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True, **authorities}


def _forget_builtin_tasks(app: Celery) -> None:
    """Unregisters Celery's own tasks, such as celery.chord, so that no message can name them."""
    app.finalize()
    for name in [name for name in app.tasks if name.startswith("celery.")]:
        app.tasks.unregister(name)
