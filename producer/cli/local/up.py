"""The mill that stays up: Redis and workers until Ctrl-C, so that other terminals can submit jobs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack

import click

from batchmill.jobs.broker.embedded import MillLock
from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.errors import BatchmillError, StoreReplaced
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.runtime.home import use_store
from batchmill.migrations.revisions import open_store
from batchmill.producer.cli.local.mill import ended_by_signal, own_redis, require_embedded
from batchmill.producer.cli.local.workers import LocalWorkers
from batchmill.producer.cli.model_name_check import warn_of_slip

#: The interval at which a mill that is up tends its Redis.
_TEND_SECONDS = 0.5


def run_mill(spec: ModelSpec, *, devices: Sequence[str], worker_words: Sequence[str], settings: Settings) -> None:
    """Runs Redis and workers until Ctrl-C or SIGTERM; `worker_words`: further words of their command line."""
    require_embedded(settings)
    with MillLock(settings.home), ended_by_signal(), own_redis(settings) as redis, ExitStack() as stack:
        store = open_store(settings)
        warn_of_slip(spec, store=store)
        store.close()
        stack.enter_context(use_store(settings.home))
        workers = LocalWorkers(spec, devices=devices, words=worker_words, settings=settings, log=sys.stderr.buffer)
        click.echo(f"the mill is up in {settings.home}; submit from another terminal, Ctrl-C stops it", err=True)
        is_told_to_end = False
        try:
            while not workers.ended(_TEND_SECONDS):
                redis.tend()
        except KeyboardInterrupt:
            is_told_to_end = True
            click.echo("stopping: finished outputs are saved, the rest returns to the queue", err=True)
        finally:
            workers.stop()
        if is_told_to_end:
            click.echo("the mill has ended", err=True)
        elif workers.failed:
            raise _failure(settings)


def _failure(settings: Settings) -> BatchmillError:
    """The reason why the workers of a mill ended by themselves."""
    if settings.database_file.exists():
        return BatchmillError("the workers ended; see the lines above")
    return StoreReplaced(f"the store of {settings.home} is gone; put its file back, or the next `up` begins a new one")
