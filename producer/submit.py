"""From a prompt file to a queued job: streams its requests into the store, opens the job, sends the wake-ups.

It knows neither how a line is read (producer.prompts) nor what the store's tables are.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from jobs import VERSION
from jobs.broker import MAX_WAKEUPS, Broker
from jobs.errors import LoadingLost, StoreError, UsageError
from jobs.logs import get_logger
from jobs.schema import DEFAULT_BATCH_SIZE, JobOptions, Provenance
from jobs.settings import Settings
from jobs.spec import ModelSpec
from jobs.store import Store
from jobs.store.loading import MAX_BYTES, MAX_REQUESTS
from producer.prompts import Line, PromptFile

log = get_logger(__name__)
#: A loading lease is renewed so often within its length.
_RENEWALS = 4


@dataclass(frozen=True, slots=True)
class Submission:
    """What a user asks for. Without `model`, the file's one model is used."""

    path: str
    model: str | None = None
    quantization: str | None = None
    revision: str | None = None
    remote_path: bool = False
    ignore_line_model: bool = False
    name: str | None = None
    options: JobOptions = field(default_factory=JobOptions)
    batch_size: int = DEFAULT_BATCH_SIZE
    command: str = ""

    def spec(self, model: str) -> ModelSpec:
        return ModelSpec.parse(
            model, quantization=self.quantization, revision=self.revision, remote_path=self.remote_path
        )

    def fingerprint(self, spec: ModelSpec, file_sha256: str) -> str:
        """Equal for the same file, model and request options: what `run` continues a job by."""
        parts = [file_sha256, spec.canonical, self.options.to_json()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_job(submission: Submission, *, store: Store, settings: Settings) -> tuple[str, ModelSpec]:
    """Stores the file as a queued job: its id and what it needs. Nothing stays stored when the file is bad.

    Raises PromptFileError, UsageError, LoadingLost, StoreError.
    """
    given = None if submission.model is None else submission.spec(submission.model)
    prompts = PromptFile(
        submission.path,
        models=() if given is None else (str(submission.model), given.model),
        ignore_line_model=submission.ignore_line_model,
    )
    lease_seconds = settings.loading_lease_seconds
    store.loading.discard_expired()
    with prompts:
        job_id = store.loading.begin(
            name=submission.name,
            options=submission.options,
            batch_size=submission.batch_size,
            provenance=Provenance(prompts.name, "", submission.command, {"batchmill": VERSION}),
            lease_seconds=lease_seconds,
        )
        try:
            with _renewed(store, job_id, lease_seconds):
                _stream(prompts, submission, given, job_id, store=store, lease_seconds=lease_seconds)
            spec = given or submission.spec(_model_of(prompts))
            fingerprint = submission.fingerprint(spec, prompts.sha256)
            store.loading.open(
                job_id,
                spec=spec,
                file_sha256=prompts.sha256,
                fingerprint=fingerprint,
                lease_seconds=lease_seconds,
            )
        except BaseException:
            store.loading.discard(job_id)
            raise
    return job_id, spec


def send_wakeups(spec: ModelSpec, *, store: Store, broker: Broker) -> None:
    """Wakes workers for what is pending. Raises BrokerUnavailable."""
    broker.send_wakeups(spec.queue, store.recovery.pending_of(spec, most=MAX_WAKEUPS))


def _stream(
    prompts: PromptFile,
    submission: Submission,
    spec: ModelSpec | None,
    job_id: str,
    *,
    store: Store,
    lease_seconds: float,
) -> None:
    plain_only = spec if spec is not None and _lacks_chat_template(spec) else None
    if plain_only is not None and submission.options.system is not None:
        raise UsageError(f"--system makes chats, and the model folder {plain_only.model} has no chat template")
    for page in _pages(prompts):
        if plain_only is not None:
            _refuse_messages(page, plain_only)
        duplicates = store.loading.add(
            job_id,
            prompts=[line.request for line in page],
            batch_size=submission.batch_size,
            lease_seconds=lease_seconds,
        )
        line_of = {line.request.index: line.number for line in page} if duplicates else {}
        for each in duplicates:
            first = f"line {line_of[each.first_index]}" if each.first_index in line_of else f"index {each.first_index}"
            prompts.report(line_of[each.index], f"duplicate custom_id {each.custom_id!r}, first used at {first}")
    prompts.raise_if_bad()


def _pages(prompts: PromptFile) -> Iterator[list[Line]]:
    """Lines in pages that fit one loading transaction."""
    page: list[Line] = []
    size = 0
    for line in prompts:
        page.append(line)
        size += line.size_bytes
        if len(page) >= MAX_REQUESTS or size >= MAX_BYTES:
            yield page
            page, size = [], 0
    if page:
        yield page


def _refuse_messages(page: list[Line], spec: ModelSpec) -> None:
    first = next((line for line in page if line.request.messages is not None), None)
    if first is not None:
        raise UsageError(
            f"line {first.number} has messages, and the model folder {spec.model} has no chat template: "
            "add chat_template.jinja to it, or submit plain prompts"
        )


def _lacks_chat_template(spec: ModelSpec) -> bool:
    """Whether this is a folder here whose files hold no chat template."""
    folder = spec.folder
    if folder is None or not folder.is_dir():
        return False
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json", "chat_templates")):
        return False
    config = folder / "tokenizer_config.json"
    try:
        return not (config.exists() and json.loads(config.read_text()).get("chat_template"))
    except ValueError:
        return True


def _model_of(prompts: PromptFile) -> str:
    if prompts.model is None:
        raise UsageError(f"{prompts.name} names no model: pass one by -m")
    return prompts.model


@contextmanager
def _renewed(store: Store, job_id: str, lease_seconds: float) -> Iterator[None]:
    """Renews the loading lease from a thread, so that a silent stdin does not lose it."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(lease_seconds / _RENEWALS):
            try:
                store.loading.renew(job_id, lease_seconds=lease_seconds)
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
