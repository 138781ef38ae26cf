"""The store's revisions, and the upgrade of a store to the newest one; a package, so found without a checkout.

A store that is at its revision is opened without importing alembic.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.engine import make_url

from batchmill.jobs.advice import mill_lives
from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.errors import AlreadyRunning, SchemaMismatch, StoreError
from batchmill.jobs.runtime.command_errors import say
from batchmill.jobs.runtime.files.disks import Disk, disk_of
from batchmill.jobs.runtime.files.locks import acquire, held_by
from batchmill.jobs.runtime.home import make_home, make_store
from batchmill.jobs.runtime.process.pid_file import PidFile
from batchmill.jobs.store.leases.older_workers import older_workers
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import REVISION

if TYPE_CHECKING:
    from alembic.config import Config

_LOCK_SECONDS = 60
_OTHER_PLACE = "set BATCHMILL_HOME to a folder of this machine's own disk, or BATCHMILL_DATABASE_URL to a PostgreSQL"


def upgrade(url: str, *, revision: str = "head") -> None:
    """Brings the store at this URL to a revision; at that revision already, nothing happens.

    Raises StoreError, also for one that cannot hold every text.
    """
    from alembic import command

    store = Store(url)
    try:
        store.database.check_encoding()
        store.revision()  # a store that cannot be reached is told of before alembic logs
        with store.database.translated():
            command.upgrade(alembic_config(url), revision)
    finally:
        store.close()


def alembic_config(url: str) -> Config:
    """Alembic's configuration for a store; the migrations lie beside this file."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["url"] = url
    return config


def open_store(settings: Settings) -> Store:
    """The store of these settings, at the right revision.

    The embedded store is made, or upgraded after a copy was kept beside it, unless a worker of an older batchmill is at
    work on it; any other store has to be at the revision already. Raises SchemaMismatch, StoreError, AlreadyRunning.
    """
    if settings.embedded_store:
        make_home(settings.home)
    check_disk(settings.database)
    store = Store(settings.database, busy_seconds=settings.busy_seconds)
    if settings.embedded_store:
        _bring_up(settings, store)
    store.check_revision()
    return store


def _bring_up(settings: Settings, store: Store) -> None:
    if not settings.database_file.exists() or store.revision() != REVISION:
        _upgrade_embedded(settings, store)


def check_disk(written: str) -> None:
    """Raises StoreError for a SQLite store on a network file system, and warns where that cannot be told."""
    url = make_url(written)
    if url.get_backend_name() != "sqlite" or not url.database:
        return
    kind, name = disk_of(Path(url.database))
    reason = f"SQLite's locks do not hold between machines; {_OTHER_PLACE}"
    if kind is Disk.SHARED:
        raise StoreError(f"the store {url.database} lies on {name}, a network file system, where {reason}")
    if kind is Disk.UNKNOWN:
        say(f"the store {url.database} lies on {name}, which may be a network file system, where {reason}")


def _upgrade_embedded(settings: Settings, store: Store) -> None:
    from filelock import FileLock, Timeout

    lock = FileLock(settings.home / "upgrade.lock", timeout=_LOCK_SECONDS)
    try:
        acquire(lock, "upgrades of the store")
    except Timeout:
        who = held_by([settings.home / "upgrade.lock"]) or "another process"
        raise AlreadyRunning(f"{who} has been upgrading the store in {settings.home} for {_LOCK_SECONDS} s") from None
    try:
        # Looked for only now: another process may have made it meanwhile, and be at work on it.
        with nullcontext() if settings.database_file.exists() else make_store(settings.home):
            _upgrade_alone(settings, store)
    finally:
        lock.release()


def _upgrade_alone(settings: Settings, store: Store) -> None:
    revision = store.revision()
    if revision == REVISION:
        return
    if revision is not None:
        _refuse_newer(revision, settings)
        _refuse_at_work(settings, store)
        _copy(settings.database_file, settings.database_file.with_suffix(f".{revision}.{int(time.time())}.db"))
    upgrade(settings.database)


def _copy(source: Path, copy: Path) -> None:
    """A consistent copy of a SQLite file that others may be using."""
    with closing(sqlite3.connect(source)) as reading, closing(sqlite3.connect(copy)) as writing:
        reading.backup(writing)


def _refuse_at_work(settings: Settings, store: Store) -> None:
    """Raises AlreadyRunning while workers of an older batchmill could not save what they are answering any more."""
    at_work = older_workers(store.database)
    if not at_work:
        return
    names = ", ".join(f"{each.name} (pid {each.pid} on {each.host})" for each in at_work)
    mill = PidFile(settings.home / "mill.pid")
    pids = [mill.pid] if mill.pid and mill_lives(settings.home) else [each.pid for each in at_work]
    lasting = [each.lease_seconds for each in at_work if each.lease_seconds is not None]
    wait = f", or wait {max(lasting):.0f} s for the leases of the dead" if len(lasting) == len(at_work) else ""
    raise AlreadyRunning(
        f"the store in {settings.home} needs an upgrade, and a worker of an older batchmill is at work on it: {names}; "
        f"end it by `kill {' '.join(map(str, pids))}`, upon which it saves its answers and hands the rest back{wait}"
    )


def _refuse_newer(revision: str, settings: Settings) -> None:
    if revision > REVISION:
        raise SchemaMismatch(
            f"the store in {settings.home} is at revision {revision}, this batchmill works at {REVISION}: "
            "use the newer batchmill that wrote it"
        )
