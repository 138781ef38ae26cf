"""Whole prompt files through a store: loaded, answered with their own prompts, and exported."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.requests.generation import Choice
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.jobs.store.leases.lease import BatchReport
from batchmill.jobs.store.store import Store
from batchmill.producer.files.export import export
from batchmill.producer.submission import Submission
from batchmill.producer.submit import load_job
from tests.support.store import mill

SETTINGS = load_settings()  # read before any test changes the environment


def load(store: Store, path: Path) -> str:
    return load_job(Submission(str(path), "echo"), store=store, settings=SETTINGS)[0]


def counted(store: Store) -> tuple[int, int, int]:
    """The numbers of jobs, batches and requests, in any state."""
    return mill.rows(store, "jobs"), mill.rows(store, "batches"), mill.rows(store, "requests")


def answer(store: Store) -> None:
    """Answers every pending request with its own prompt."""
    who = mill.session(store)
    while found := mill.claim(store, who):
        for claimed in found:
            outputs = [
                Output(
                    RequestKey(claimed.lease.job_id, each.index),
                    (
                        Choice(
                            each.prompt if each.prompt is not None else (each.messages or ({},))[-1]["content"], "stop"
                        ),
                    ),
                )
                for each in claimed.requests
            ]
            mill.save(store, who, [BatchReport(claimed.lease, outputs=outputs)])


def exported(store: Store, job_id: str, folder: Path, form: str) -> list[tuple[str, str]]:
    """The custom_id and the text of every output, as a reader of the file finds them."""
    out = folder / f"out.{form}"
    export(store, store.jobs.job(job_id), out=out, form=form, only="all")
    if form == "csv":
        rows = csv.DictReader(io.StringIO(out.read_bytes().decode(), newline=""))
        return [(row["custom_id"], row["text"]) for row in rows]
    lines = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    if form == "jsonl":
        return [(line["custom_id"], line["text"]) for line in lines]
    first = [line["response"]["body"]["choices"][0] for line in lines]
    texts = [each["message"]["content"] if "message" in each else each["text"] for each in first]
    return [(line["custom_id"], text) for line, text in zip(lines, texts, strict=True)]


def prompt(text: str, **more: Any) -> bytes:
    return json.dumps({"prompt": text, **more}, ensure_ascii=False).encode()
