"""Writes down how a job of a mill went, for its replay.

`python -m tests.support.timelines.record STORE_URL JOB ROWS tests/support/timelines/recorded/NAME.json`

A request a line of JSON, in file order: when it entered the engine and when it was saved, in seconds since the job
began, the tokens of prompt and answer, and the bytes of its body. No prompt and no answer is in it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from batchmill.jobs.requests.states import RequestState
from batchmill.jobs.store.bounds import text_bytes
from batchmill.jobs.store.store import Store

_PAGE = 1_000


def record(url: str, written: str, *, rows: int, out: Path) -> None:
    """`rows`: how many requests its one worker took at once."""
    store = Store(url)
    job = store.jobs.job(store.jobs.find(written))
    pages = store.jobs.output_pages(job.id, states=frozenset(RequestState), page=_PAGE)
    begin, events, tells = job.started_at or job.queued_at, [], False
    for page in pages:
        for row in page:
            took = (row.prefill_seconds or 0.0) + (row.decode_seconds or 0.0)
            tells |= took > 0
            ended = row.finished_at - begin
            tokens = row.completion_tokens if row.state == RequestState.SUCCEEDED else 0
            events.append([round(ended - took, 3), round(ended, 3), row.prompt_tokens, tokens, text_bytes(row.body)])
    store.close()
    head = {"rows": rows, "max_tokens": (job.sampling or {})["max_tokens"], "tells": tells}
    lines = ",\n".join(json.dumps(each, separators=(",", ":")) for each in events)
    out.write_text(f'{json.dumps(head)[:-1]}, "events": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    record(sys.argv[1], sys.argv[2], rows=int(sys.argv[3]), out=Path(sys.argv[4]))
