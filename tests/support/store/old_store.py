"""A store as an earlier revision left it: jobs in every state, half done and whole, in that revision's tables.

The rows are written by name into the tables as they are found, so that no code of today has a hand in them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, MetaData, create_engine, func, insert, select
from sqlalchemy.engine import make_url

from batchmill.jobs.requests.states import JobState
from batchmill.migrations import revisions
from tests.support.store.mill import ECHO_SPEC

#: The adapter that the running job has used.
ADAPTER = {"a": {"path": "/adapters/a", "revision": None}}
_ANSWER = json.dumps([{"text": "an answer", "finish_reason": "stop"}])
_NO_COUNTS = {"succeeded": 0, "failed": 0, "cancelled": 0}
#: The batches of a job in each state: the batch's state, and the states of its requests' outputs, None for no output.
_BATCHES: dict[JobState, list[tuple[str, list[str | None]]]] = {
    JobState.LOADING: [("pending", [None, None])],
    JobState.QUEUED: [("pending", [None, None]), ("pending", [None])],
    JobState.RUNNING: [("done", ["succeeded", "failed"]), ("leased", ["succeeded", None]), ("pending", [None, None])],
    JobState.COMPLETED: [("done", ["succeeded", "failed"]), ("done", ["succeeded"])],
    JobState.CANCELLING: [("done", ["succeeded"]), ("leased", ["succeeded", None])],
    JobState.CANCELLED: [("done", ["succeeded"]), ("cancelled", ["cancelled", "succeeded"])],
}


def build(url: str, *, revision: str) -> None:
    """Makes the store at this revision, which has the columns of 0004 at least. A job's id is its state."""
    revisions.upgrade(url, revision=revision)
    engine = create_engine(make_url(url))
    with engine.begin() as connection:
        _Old(connection).fill()
    engine.dispose()


class _Old:
    """The tables of that revision."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._tables = MetaData()
        self._tables.reflect(connection)
        #: The column of answers, which 0012 renamed.
        self._payload = "payload" if "payload" in self._tables.tables["outputs"].c else "choices"
        self._now = time.time()
        self._ids = iter(range(1, 1_000))

    def fill(self) -> None:
        worker = self._worker("ready")
        self._worker("stopped")
        for state, found in _BATCHES.items():
            self._job(state)
            index = 0
            for batch, outputs in found:
                self._batch(state, batch, outputs, first=index, worker=worker)
                index += len(outputs)
        if self._connection.dialect.name == "postgresql":
            for table in ("batches", "runs", "workers"):  # whose ids were written here
                sequence = func.pg_get_serial_sequence(table, "id")
                self._connection.execute(select(func.setval(sequence, next(self._ids))))

    def _insert(self, table: str, **row: Any) -> None:
        self._connection.execute(insert(self._tables.tables[table]).values(row))

    def _worker(self, state: str) -> int:
        worker_id = next(self._ids)
        self._insert(
            "workers",
            id=worker_id,
            host="host",
            name=f"w{worker_id}",
            pid=worker_id,
            state=state,
            spec=ECHO_SPEC.canonical,
            model="echo",
            quantization="none",
            device="cpu",
            generation=1,
            child_pid=2,
            adapters=json.dumps(ADAPTER),
            versions="{}",
            started_at=self._now - 600,
            heartbeat_at=self._now - 300,
            alive_until=self._now - 280,
        )
        return worker_id

    def _job(self, state: JobState) -> None:
        is_begun = state not in (JobState.LOADING, JobState.QUEUED)
        is_closed = state in (JobState.COMPLETED, JobState.CANCELLED)
        self._insert(
            "jobs",
            id=state.value,
            state=state.value,
            spec=None if state is JobState.LOADING else ECHO_SPEC.canonical,
            model="echo",
            quantization="none",
            batch_size=2,
            options=json.dumps({"adapters": ["a"]}),
            sampling="{}" if is_begun else None,
            adapters=json.dumps(ADAPTER) if state is JobState.RUNNING else None,
            fingerprint="fingerprint",
            file_name="p.jsonl",
            file_sha256="0" * 64,
            command="batchmill submit p.jsonl",
            versions='{"batchmill": "0.1.0"}',
            created_at=self._now - 700,
            queued_at=None if state is JobState.LOADING else self._now - 690,
            started_at=self._now - 500 if is_begun else None,
            finished_at=self._now - 400 if is_closed else None,
            loading_until=self._now - 650 if state is JobState.LOADING else None,
        )

    def _batch(self, state: JobState, batch: str, outputs: list[str | None], *, first: int, worker: int) -> None:
        batch_id, run_id = next(self._ids), next(self._ids)
        is_held, ran = batch == "leased", batch != "pending"
        adapter = "a" if state is JobState.RUNNING else ""
        self._insert(
            "batches",
            id=batch_id,
            job_id=state.value,
            state=batch,
            fence=int(ran),
            worker_id=worker if is_held else None,
            worker_generation=1 if is_held else None,
            lease_until=self._now - 270 if is_held else None,
            adapter=adapter,
            total=len(outputs),
            prompt_tokens=len([each for each in outputs if each == "succeeded"]),
            completion_tokens=len([each for each in outputs if each == "succeeded"]),
            **_NO_COUNTS | {each: outputs.count(each) for each in outputs if each is not None},
        )
        if ran:
            self._run(state, batch, outputs, first=first, id=run_id, batch_id=batch_id, worker_id=worker)
        for index, output in enumerate(outputs, first):
            body = json.dumps({"prompt": f"prompt {index}"} | ({"adapter": adapter} if adapter else {}))
            row = {"job_id": state.value, "index": index}
            self._insert("requests", **row, custom_id=f"request-{index}", batch_id=batch_id, body=body)
            if output is not None:
                kept = {self._payload: _ANSWER if output == "succeeded" else "[]"}
                self._insert("outputs", **row, **kept, **dict(_output(output, run_id)), finished_at=self._now - 450)

    def _run(self, state: JobState, batch: str, outputs: list[str | None], *, first: int, **ids: int) -> None:
        is_held = batch == "leased"
        in_flight = [index for index, each in enumerate(outputs, first) if each is None]
        counts = {each: outputs.count(each) for each in ("succeeded", "failed")}
        self._insert(
            "runs",
            job_id=state.value,
            fence=1,
            worker_generation=1,
            device="cpu",
            model_load_seconds=1.0,
            started_at=self._now - 500,
            finished_at=None if is_held else self._now - 440,
            outcome=None if is_held else batch,
            in_flight=json.dumps(in_flight if is_held else []),
            error_codes=json.dumps({"engine_error": counts["failed"]} if counts["failed"] else {}),
            prompt_tokens=counts["succeeded"],
            completion_tokens=counts["succeeded"],
            **ids,
            **counts,
        )


def _output(state: str, run_id: int) -> Iterator[tuple[str, Any]]:
    """The columns of an output in this state."""
    is_answer = state == "succeeded"
    yield "run_id", None if state == "cancelled" else run_id
    yield "state", state
    yield from {"prompt_tokens": int(is_answer), "completion_tokens": int(is_answer)}.items()
    yield "error_code", None if is_answer else {"failed": "engine_error", "cancelled": "cancelled"}[state]
    yield "error_message", None if is_answer else "it did not"
