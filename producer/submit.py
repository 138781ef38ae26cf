"""The way of a submission to a queued job: streams its requests into the store, opens the job, sends the wake-ups.

A key makes a submission idempotent: it opens one job, however often it is made, and even if several are made at once.

It knows neither how a line is read (producer.files.prompt_file) nor what the store's tables are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from batchmill.jobs import VERSION
from batchmill.jobs.broker.client import MAX_WAKEUPS, Broker
from batchmill.jobs.broker.queue_name import queue_name
from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.errors import BatchmillError, KeyTaken, LoadingLost, StoreError, UsageError
from batchmill.jobs.models.folder import no_model
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.request import JobOptions, Provenance
from batchmill.jobs.runtime.failpoints import failpoint
from batchmill.jobs.runtime.logs import get_logger
from batchmill.jobs.store.bounds import PAGE_BYTES
from batchmill.jobs.store.jobs.create import MAX_REQUESTS
from batchmill.jobs.store.store import Store
from batchmill.producer.files.prompt_file import PromptFile, PromptLine
from batchmill.producer.requests.chat_template import lacks_chat_template, refuse_chat_options, refuse_messages
from batchmill.producer.requests.kinds import forms_of
from batchmill.producer.submission import Submission

log = get_logger(__name__)
#: The renewals of a loading lease within its length, and the longest time between two. A process with shorter leases
#: than this one takes a long lease that is not renewed for one of a clock that was set back.
_RENEWALS = 4
_RENEWAL_SECONDS = 15.0
_DUPLICATE = "duplicate custom_id"


class Submitted(NamedTuple):
    """The job of a submission."""

    job_id: str
    spec: ModelSpec
    is_new: bool  #: False for the job of an earlier submit


def load_once(
    submission: Submission, *, store: Store, settings: Settings, vet: Callable[[ModelSpec], None] = lambda _: None
) -> Submitted:
    """Stores the file as a queued job, unless its key has one already.

    Raises UsageError where that job is of other content, and the errors of load_job.
    """
    try:
        _refuse_submitted(submission, store)
        return Submitted(*load_job(submission, store=store, settings=settings, vet=vet), is_new=True)
    except KeyTaken as taken:
        if not taken.is_same:
            raise
        return Submitted(taken.job_id, store.jobs.job(taken.job_id).spec, is_new=False)


def load_job(
    submission: Submission,
    *,
    store: Store,
    settings: Settings,
    vet: Callable[[ModelSpec], None] = lambda _: None,
    stored: Callable[[str], None] = lambda _: None,
) -> tuple[str, ModelSpec]:
    """Stores the file as a queued job; returns its id and ModelSpec. Nothing stays stored when the file is bad.

    `vet` is called with the model as soon as it is known, and may raise.
    `stored` is called with the job's id after each page of a file that is good so far, and may raise.

    Raises PromptFileError, UsageError, KeyTaken, LoadingLost, StoreError.
    """
    given = None if submission.model is None else submission.spec(submission.model)
    if given is not None:
        _refuse_no_model(given)
        vet(given)
    lease_seconds = settings.loading_lease_seconds
    with _prompt_file(submission, given, settings) as prompts:
        job_id = store.creation.begin(
            name=submission.name,
            options=submission.options,
            batch_size=submission.batch_size,
            provenance=Provenance(prompts.name, "", submission.command, {"batchmill": VERSION}),
            lease_seconds=lease_seconds,
        )
        try:
            with _renewed(store, job_id, lease_seconds):
                for _ in _stream(prompts, submission, given, job_id, store=store, lease_seconds=lease_seconds):
                    if not prompts.is_bad:
                        stored(job_id)
                prompts.raise_if_bad()
            for name in prompts.unnamed_adapters:
                log.warning("an adapter was declared, and no line of the file names it", adapter=name)
            spec = _opened(submission, given, prompts, job_id, store=store, lease_seconds=lease_seconds, vet=vet)
        except BaseException as error:
            _discard(store, job_id)
            if isinstance(error, OSError):
                raise BatchmillError(f"{prompts.name} was not stored: {error.strerror or error}") from error
            raise
    failpoint("submit.opened")
    return job_id, spec


def _prompt_file(submission: Submission, given: ModelSpec | None, settings: Settings) -> PromptFile:
    return PromptFile(
        submission.path,
        form=submission.form,
        models=() if given is None else (str(submission.model), given.model),
        adapters=submission.options.adapters,
        ignore_line_model=submission.ignore_line_model,
        max_line_bytes=settings.max_line_bytes,
    )


def _opened(
    submission: Submission,
    given: ModelSpec | None,
    prompts: PromptFile,
    job_id: str,
    *,
    store: Store,
    lease_seconds: float,
    vet: Callable[[ModelSpec], None],
) -> ModelSpec:
    """Queues the job of a file that is good to its end. Returns its model, which `vet` may refuse."""
    spec = given or submission.spec(_model_of(prompts))
    if given is None:
        _refuse_no_model(spec)
        vet(spec)
    fingerprint = submission.fingerprint(spec, prompts.sha256)
    assert prompts.kind is not None  # a file without a request is bad
    store.creation.open(
        job_id,
        spec=spec,
        file_sha256=prompts.sha256,
        fingerprint=fingerprint,
        lease_seconds=lease_seconds,
        idempotency_key=submission.key(fingerprint),
        kind=prompts.kind,
    )
    return spec


def send_wakeups(spec: ModelSpec, *, store: Store, broker: Broker) -> None:
    """Sends wake-ups for pending batches of a model. Raises BrokerUnavailable."""
    broker.send_wakeups(queue_name(spec, store.id), store.recovery.pending_of(spec, most=MAX_WAKEUPS))


def _refuse_submitted(submission: Submission, store: Store) -> None:
    """Raises KeyTaken where that is known before anything is stored: a second submit of a long file is quick."""
    if submission.model is None or not (submission.once or submission.idempotency_key):
        return
    fingerprint = submission.fingerprint_of_file(submission.spec(submission.model))
    if fingerprint is not None and (key := submission.key(fingerprint)) is not None:
        store.creation.refuse_taken(key, fingerprint=fingerprint)


def _discard(store: Store, job_id: str) -> None:
    try:
        store.creation.discard(job_id)
    except StoreError as error:
        # Nobody sees these rows, and a reconciler deletes them later; the user has to see why the submit failed.
        log.warning("what a failed submit stored is deleted later", job=job_id, error=str(error))


def _stream(
    prompts: PromptFile,
    submission: Submission,
    spec: ModelSpec | None,
    job_id: str,
    *,
    store: Store,
    lease_seconds: float,
) -> Iterator[None]:
    """Stores the lines of the file; yields after each page."""
    plain_only = spec if spec is not None and lacks_chat_template(spec) else None
    if plain_only is not None:
        refuse_chat_options(submission.options, plain_only)
    for page in _pages(prompts):
        _refuse_options(submission.options, page[0].request.kind)
        if plain_only is not None:
            refuse_messages(((each.number, each.request) for each in page), plain_only)
        duplicates = store.creation.add(
            job_id,
            prompts=[line.request for line in page],
            batch_size=submission.batch_size,
            lease_seconds=lease_seconds,
        )
        failpoint("submit.page")
        line_of = {line.request.index: line.number for line in page} if duplicates else {}
        for each in duplicates:
            first = f"line {line_of[each.first_index]}" if each.first_index in line_of else f"index {each.first_index}"
            prompts.report(
                line_of[each.index], f"duplicate custom_id {each.custom_id!r}, first used at {first}", _DUPLICATE
            )
        yield


def _pages(prompts: PromptFile) -> Iterator[list[PromptLine]]:
    """Lines in pages that fit one loading transaction."""
    page: list[PromptLine] = []
    size = 0
    for line in prompts:
        if page and (len(page) >= MAX_REQUESTS or size + line.size_bytes > PAGE_BYTES):
            yield page
            page, size = [], 0
        page.append(line)
        size += line.size_bytes
    if page:
        yield page


def _refuse_no_model(spec: ModelSpec) -> None:
    """Raises UsageError for a folder here that holds no model."""
    folder = spec.folder
    with suppress(OSError):  # the workers may be allowed to read it, and say so if not
        if folder is not None and folder.is_dir() and (why := no_model(folder)) is not None:
            raise UsageError(why)


def _refuse_options(options: JobOptions, kind: str) -> None:
    """Raises UsageError for flags that requests of this kind do not know."""
    foreign = sorted(options.to_json().keys() - forms_of(kind).options)
    if foreign:
        raise UsageError(f"the file holds requests of kind {kind}, for which no flag sets {', '.join(foreign)}")


def _model_of(prompts: PromptFile) -> str:
    if prompts.model is None:
        raise UsageError(f"{prompts.name} names no model: pass one with -m")
    return prompts.model


@contextmanager
def _renewed(store: Store, job_id: str, lease_seconds: float) -> Iterator[None]:
    """Renews the loading lease from a thread, so that a silent stdin does not lose it."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(min(lease_seconds / _RENEWALS, _RENEWAL_SECONDS)):
            try:
                store.creation.renew(job_id, lease_seconds=lease_seconds)
            except LoadingLost:
                return  # the next page says so
            except StoreError as error:
                log.warning("the loading lease was not renewed", job=job_id, error=str(error))

    thread = threading.Thread(target=renew, name="loading lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
