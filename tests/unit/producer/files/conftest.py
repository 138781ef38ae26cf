"""Jobs to export, in a store on SQLite."""

from __future__ import annotations

import pytest

from batchmill.jobs.requests.generation import Choice, GenerationRequest
from batchmill.jobs.requests.request import ErrorCode, Output, RequestKey, Timings
from batchmill.jobs.store.leases.lease import BatchReport
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.jobs import Job
from tests.support.logprobs import LOGPROBS
from tests.support.store import mill

PASSED = {"user": "u", "metadata": {"a": "b"}}
REQUESTS = [
    GenerationRequest(0, "chat", messages=({"role": "user", "content": "hi"},), passthrough=PASSED),
    GenerationRequest(1, "plain", prompt='it says "messages": here'),
    GenerationRequest(2, "too long", prompt="x"),
    GenerationRequest(3, "no memory", prompt="x"),
    GenerationRequest(4, "left", prompt="x"),
]


@pytest.fixture
def store(sqlite_url: str) -> Store:
    """A store on SQLite; an export reads from both databases by the same statements."""
    return Store(sqlite_url)


@pytest.fixture
def job(store: Store) -> Job:
    """A cancelled job with an output of every kind."""
    job_id = mill.begin(store, batch_size=4)
    store.creation.add(job_id, prompts=REQUESTS, batch_size=4, lease_seconds=60)
    store.creation.open(job_id, spec=mill.ECHO_SPEC, file_sha256="", fingerprint="", lease_seconds=60)
    who = mill.session(store)
    (claimed,) = mill.claim(store, who)
    outputs = [
        Output(RequestKey(job_id, 0), (Choice("hello\u2028ü", "stop"),), 3, 4),
        Output(RequestKey(job_id, 1), (Choice('a,"b"\nc', "length"),), 5, 6),
        Output.failed(RequestKey(job_id, 2), ErrorCode.CONTEXT_LENGTH_EXCEEDED, "too long", prompt_tokens=9),
        Output.failed(RequestKey(job_id, 3), ErrorCode.OUT_OF_MEMORY, "no memory"),
    ]
    mill.save(store, who, [BatchReport(claimed.lease, outputs=outputs)])
    store.closing.cancel(job_id)
    return store.jobs.job(job_id)


@pytest.fixture
def rich(store: Store) -> Job:
    """A job whose outputs have several choices, logprobs and timings: one of messages, one of a prompt."""
    job_id = mill.begin(store, batch_size=4)
    store.creation.add(job_id, prompts=REQUESTS[:2], batch_size=4, lease_seconds=60)
    store.creation.open(job_id, spec=mill.ECHO_SPEC, file_sha256="", fingerprint="", lease_seconds=60)
    who = mill.session(store)
    (claimed,) = mill.claim(store, who)
    choices = (Choice("hey", "stop", LOGPROBS), Choice("ho", "length", {"content": []}))
    timings = Timings(0.25, 0.5, 1.0)
    outputs = [Output(RequestKey(job_id, index), choices, 3, 5, timings=timings) for index in (0, 1)]
    mill.save(store, who, [BatchReport(claimed.lease, outputs=outputs)])
    return store.jobs.job(job_id)
