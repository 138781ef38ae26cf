"""The oracle: what must hold in a store at any moment, and in one whose jobs have ended, whatever went wrong before.

It asks the tables in plain SQL of its own, so that a mistake in the store's queries cannot hide itself, and knows
nothing of workers or Redis. Names in brackets are the invariants: I1 one output per request, I3 an ended request has an
output, I4 no request is lost, I5 a pending request is in an open batch, I6 a closed job has nothing pending, I7 fences
grow and outputs carry the one that held, I8 one live lease per batch, I9 states and counts follow from the outputs.
I10 a batch is of one adapter, and all runs of a job mean the same by its name, I11 all runs of a job are of one model.
I2, that an output never changes, needs two looks: `accepted` before and `changed` after.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sqlalchemy import Connection, select, text

from batchmill.jobs.store.store import Store

#: So many sentences of one kind are enough to know it.
_MOST_OF_A_KIND = 10
#: Tolerance between two columns that follow each other, for a step of the clock or its rounding.
_CLOCK_SECONDS = 0.005

_OUTPUTS = """
    SELECT r.batch_id, count(*) AS answered,
           sum(CASE WHEN o.state = 'succeeded' THEN 1 ELSE 0 END) AS succeeded,
           sum(CASE WHEN o.state = 'failed' THEN 1 ELSE 0 END) AS failed,
           sum(CASE WHEN o.state = 'cancelled' THEN 1 ELSE 0 END) AS cancelled,
           sum(o.prompt_tokens) AS prompt_tokens, sum(o.completion_tokens) AS completion_tokens
    FROM outputs o JOIN requests r ON r.job_id = o.job_id AND r."index" = o."index"
    GROUP BY r.batch_id
"""


def _count_differs(name: str) -> tuple[str, str]:
    return (
        f"batch {{id}} of job {{job_id}} says {name}={{said}}, its outputs say {{found}} [I9]",
        f"""SELECT b.id, b.job_id, b.{name} AS said, coalesce(o.{name}, 0) AS found
            FROM batches b LEFT JOIN ({_OUTPUTS}) o ON o.batch_id = b.id
            WHERE b.{name} <> coalesce(o.{name}, 0)""",  # noqa: S608
    )


def _reasons_fall_short() -> tuple[str, str]:
    """Every answer has a choice at least; what was answered before revision 0007 has no counts."""
    return (
        "batch {id} of job {job_id} has {succeeded} answers, of whose choices {said} ended [I9]",
        """SELECT id, job_id, succeeded, stop_choices + length_choices AS said
           FROM batches WHERE stop_choices + length_choices < succeeded""",
    )


#: Pairs of a sentence and its query; the sentence is said of each row that the query finds.
_ALWAYS: tuple[tuple[str, str], ...] = (
    # --- requests and outputs
    (
        "index {place} of job {job_id} has {times} outputs [I1]",
        """SELECT job_id, "index" AS place, count(*) AS times FROM outputs
           GROUP BY job_id, "index" HAVING count(*) > 1""",
    ),
    (
        "index {place} of job {job_id} is there {times} times [I4]",
        """SELECT job_id, "index" AS place, count(*) AS times FROM requests
           GROUP BY job_id, "index" HAVING count(*) > 1""",
    ),
    (
        "the output of job {job_id}, index {place}, has no request [I4]",
        """SELECT o.job_id, o."index" AS place
           FROM outputs o LEFT JOIN requests r ON r.job_id = o.job_id AND r."index" = o."index"
           WHERE r.job_id IS NULL""",
    ),
    (
        "job {id} is {state} and has {found} requests, the lowest index {lowest}, the highest {highest} [I4]",
        """SELECT j.id, j.state, count(r.job_id) AS found, min(r."index") AS lowest, max(r."index") AS highest
           FROM jobs j LEFT JOIN requests r ON r.job_id = j.id WHERE j.state <> 'loading' GROUP BY j.id, j.state
           HAVING count(r.job_id) = 0 OR min(r."index") <> 0 OR max(r."index") <> count(r.job_id) - 1""",
    ),
    (
        "index {place} of job {job_id} is in batch {batch_id}, which is not a batch of this job [I5]",
        """SELECT r.job_id, r."index" AS place, r.batch_id
           FROM requests r LEFT JOIN batches b ON b.id = r.batch_id AND b.job_id = r.job_id WHERE b.id IS NULL""",
    ),
    (
        "index {place} of job {job_id} has no output, and its batch {batch_id} is {state} [I5]",
        """SELECT r.job_id, r."index" AS place, r.batch_id, b.state
           FROM requests r JOIN batches b ON b.id = r.batch_id
           LEFT JOIN outputs o ON o.job_id = r.job_id AND o."index" = r."index"
           WHERE o.job_id IS NULL AND b.state IN ('done', 'cancelled')""",
    ),
    (
        "job {id} is {state}, and its index {place} has no output [I6]",
        """SELECT j.id, j.state, r."index" AS place FROM jobs j JOIN requests r ON r.job_id = j.id
           LEFT JOIN outputs o ON o.job_id = r.job_id AND o."index" = r."index"
           WHERE o.job_id IS NULL AND j.state IN ('completed', 'cancelled')""",
    ),
    (
        "the output of job {job_id}, index {place}, is {state} with the error {error_code} and {payload} [I3]",
        """SELECT job_id, "index" AS place, state, error_code, payload FROM outputs
           WHERE (state = 'succeeded') <> (error_code IS NULL) OR (state = 'succeeded' AND payload = '[]')""",
    ),
    # --- counts
    (
        "batch {id} of job {job_id} has total={total} and {found} requests [I4]",
        """SELECT b.id, b.job_id, b.total, count(r.job_id) AS found
           FROM batches b JOIN jobs j ON j.id = b.job_id LEFT JOIN requests r ON r.batch_id = b.id
           WHERE j.state <> 'loading' OR j.loading_until >= :now
           GROUP BY b.id, b.job_id, b.total HAVING b.total <> count(r.job_id)""",
    ),
    _reasons_fall_short(),
    *map(_count_differs, ("succeeded", "failed", "cancelled", "prompt_tokens", "completion_tokens")),
    (
        "batch {id} of job {job_id} is {state} with {answered} of {total} answered [I9]",
        """SELECT id, job_id, state, total, succeeded + failed + cancelled AS answered FROM batches
           WHERE (state IN ('done', 'cancelled')) <> (succeeded + failed + cancelled = total)""",
    ),
    (
        "run {id} of job {job_id} says succeeded={said}, its outputs say {found} [I9]",
        """SELECT u.id, u.job_id, u.succeeded AS said, count(o.job_id) AS found
           FROM runs u LEFT JOIN outputs o ON o.run_id = u.id AND o.state = 'succeeded'
           GROUP BY u.id, u.job_id, u.succeeded HAVING u.succeeded <> count(o.job_id)""",
    ),
    (  # A retry deletes failed outputs, and the run keeps its count.
        "run {id} of job {job_id} says failed={said}, its outputs say {found} [I9]",
        """SELECT u.id, u.job_id, u.failed AS said, count(o.job_id) AS found
           FROM runs u LEFT JOIN outputs o ON o.run_id = u.id AND o.state = 'failed'
           GROUP BY u.id, u.job_id, u.failed HAVING u.failed < count(o.job_id)""",
    ),
    # --- leases, runs and fences
    (
        "batch {id} is {state} with worker={worker_id}, generation={worker_generation}, until={lease_until} [I8]",
        """SELECT id, state, worker_id, worker_generation, lease_until FROM batches
           WHERE (state = 'leased') <> (worker_id IS NOT NULL) OR (state = 'leased') <> (lease_until IS NOT NULL)
              OR (state = 'leased') <> (worker_generation IS NOT NULL)""",
    ),
    (
        "batch {id} is leased to generation {worker_generation} of worker {worker_id}, which has {generation} [I8]",
        """SELECT b.id, b.worker_id, b.worker_generation, w.generation
           FROM batches b LEFT JOIN workers w ON w.id = b.worker_id
           WHERE b.state = 'leased' AND (w.id IS NULL OR b.worker_generation > w.generation)""",
    ),
    (
        "batch {id} is leased under fence {fence} and has {found} open runs of that worker and fence [I8]",
        """SELECT b.id, b.fence, count(u.id) AS found FROM batches b
           LEFT JOIN runs u ON u.batch_id = b.id AND u.finished_at IS NULL AND u.fence = b.fence
                AND u.worker_id = b.worker_id AND u.worker_generation = b.worker_generation
           WHERE b.state = 'leased' GROUP BY b.id, b.fence HAVING count(u.id) <> 1""",
    ),
    (
        "batch {batch_id} has {found} open runs [I8]",
        """SELECT batch_id, count(*) AS found FROM runs WHERE finished_at IS NULL
           GROUP BY batch_id HAVING count(*) > 1""",
    ),
    (
        "run {id} is open, and its batch {batch_id} is {state} [I8]",
        """SELECT u.id, u.batch_id, b.state FROM runs u JOIN batches b ON b.id = u.batch_id
           WHERE u.finished_at IS NULL AND b.state <> 'leased'""",
    ),
    (
        "run {id} has fence {fence}, and its batch {batch_id} has {highest} [I7]",
        """SELECT u.id, u.fence, u.batch_id, b.fence AS highest FROM runs u JOIN batches b ON b.id = u.batch_id
           WHERE u.fence < 1 OR u.fence > b.fence""",
    ),
    (
        "batch {batch_id} has {times} runs of fence {fence} [I7]",
        "SELECT batch_id, fence, count(*) AS times FROM runs GROUP BY batch_id, fence HAVING count(*) > 1",
    ),
    (
        "batch {id} has fence {fence} and {found} runs [I7]",
        """SELECT b.id, b.fence, count(u.id) AS found FROM batches b LEFT JOIN runs u ON u.batch_id = b.id
           GROUP BY b.id, b.fence HAVING b.fence <> count(u.id)""",
    ),
    (
        "run {id} is of job {job_id}, and its batch {batch_id} is not [I7]",
        """SELECT u.id, u.job_id, u.batch_id FROM runs u
           LEFT JOIN batches b ON b.id = u.batch_id AND b.job_id = u.job_id WHERE b.id IS NULL""",
    ),
    (
        "run {id} began after it ended, or ended without an outcome [I8]",
        """SELECT id FROM runs
           WHERE finished_at < started_at - :clock OR (finished_at IS NULL) <> (outcome IS NULL)""",
    ),
    (
        "run {id} of batch {batch_id} began before the run ahead of it had ended [I8]",
        """SELECT id, batch_id FROM (
               SELECT id, batch_id, started_at, lag(finished_at) OVER (PARTITION BY batch_id ORDER BY fence) AS ahead
               FROM runs) AS pairs
           WHERE ahead > started_at + :clock""",
    ),
    (  # A request may move to another batch, so the run need not be of the batch that it is in now.
        "the output of job {job_id}, index {place}, is of run {run_id}, which is not a run of this job [I7]",
        """SELECT o.job_id, o."index" AS place, o.run_id
           FROM outputs o LEFT JOIN runs u ON u.id = o.run_id AND u.job_id = o.job_id
           WHERE o.run_id IS NOT NULL AND u.id IS NULL""",
    ),
    (
        "the output of job {job_id}, index {place}, is {state}, of run {run_id} [I7]",
        """SELECT job_id, "index" AS place, state, run_id FROM outputs
           WHERE (state = 'cancelled') <> (run_id IS NULL)""",
    ),
    (
        "the output of job {job_id}, index {place}, was written while its run {run_id} was not open [I7]",
        """SELECT o.job_id, o."index" AS place, o.run_id FROM outputs o JOIN runs u ON u.id = o.run_id
           WHERE o.finished_at < u.started_at - :clock OR o.finished_at > u.finished_at + :clock""",
    ),
    (
        "batch {id} has {crashes} crashes and {total} requests [I9]",
        """SELECT id, crashes, total FROM batches WHERE crashes < 0
           OR total > CASE crashes WHEN 0 THEN total WHEN 1 THEN 16 WHEN 2 THEN 4 WHEN 3 THEN 1 WHEN 4 THEN 1
                      ELSE -1 END""",
    ),
    # --- jobs
    (
        "job {id} is {state} with {pending} pending, {leased} leased and {ended} ended batches [I9]",
        """SELECT j.id, j.state, sum(CASE WHEN b.state = 'pending' THEN 1 ELSE 0 END) AS pending,
                  sum(CASE WHEN b.state = 'leased' THEN 1 ELSE 0 END) AS leased,
                  sum(CASE WHEN b.state IN ('done', 'cancelled') THEN 1 ELSE 0 END) AS ended
           FROM jobs j JOIN batches b ON b.job_id = j.id GROUP BY j.id, j.state
           HAVING (j.state IN ('completed', 'cancelled') AND sum(CASE WHEN b.state IN ('pending', 'leased')
                                                                  THEN 1 ELSE 0 END) > 0)
               OR (j.state = 'running' AND sum(CASE WHEN b.state IN ('pending', 'leased') THEN 1 ELSE 0 END) = 0)
               OR (j.state = 'queued' AND (sum(CASE WHEN b.state = 'pending' THEN 1 ELSE 0 END) = 0
                                           OR sum(CASE WHEN b.state = 'leased' THEN 1 ELSE 0 END) > 0))
               OR (j.state = 'loading' AND sum(CASE WHEN b.state <> 'pending' OR b.fence > 0
                                               THEN 1 ELSE 0 END) > 0)""",
    ),
    (
        "job {id} is {state} with spec={spec}, queued_at={queued_at}, started_at={started_at}, "
        "finished_at={finished_at} [I9]",
        """SELECT id, state, spec, queued_at, started_at, finished_at FROM jobs
           WHERE (state IN ('completed', 'cancelled')) <> (finished_at IS NOT NULL)
              OR (state IN ('running', 'completed') AND started_at IS NULL)
              OR (state <> 'loading' AND (spec IS NULL OR queued_at IS NULL))
              OR (state = 'loading') <> (loading_until IS NOT NULL)""",
    ),
    (
        "job {id} is completed, no retry of it is under way, and {found} of its outputs are cancelled [I9]",
        """SELECT j.id, count(*) AS found FROM jobs j JOIN outputs o ON o.job_id = j.id
           WHERE j.state = 'completed' AND j.retry_started_at IS NULL AND o.state = 'cancelled' GROUP BY j.id""",
    ),
)
#: As `_ALWAYS`, but wrong only once all work has ended.
_CLOSED: tuple[tuple[str, str], ...] = (
    (
        "job {id} is {state}, not closed",
        "SELECT id, state FROM jobs WHERE state NOT IN ('completed', 'cancelled', 'loading')",
    ),
    (
        "job {id} is loading under a lease that holds",
        "SELECT id FROM jobs WHERE state = 'loading' AND loading_until >= :now",
    ),
    (
        "batch {id} is still leased to worker {worker_id}",
        "SELECT id, worker_id FROM batches WHERE state = 'leased'",
    ),
)


def violations(store: Store, *, closed: bool = True) -> list[str]:
    """A sentence for each thing in this store that must not be; none if all is well.

    `closed`: all work has ended, so that an open job, a lease, or a file that is being loaded is wrong too.
    Unless `closed`, it may be asked at any moment: it looks at one state of the store, while others go on.
    """
    checks = _ALWAYS + _CLOSED if closed else _ALWAYS
    with store.database.read() as connection:
        if not store.database.is_sqlite:
            connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        values = {"now": connection.scalar(select(store.database.now)), "clock": _CLOCK_SECONDS}
        found = [sentence for check in checks for sentence in _found(connection, *check, values)]
        return [
            *found,
            *_wrong_in_flight(connection),
            *_wrong_error_codes(connection),
            *_misplaced(connection),
            *_mixed_meanings(connection),
            *_mixed_models(connection),
        ]


def accepted(store: Store) -> dict[tuple[str, int], tuple[Any, ...]]:
    """The successful outputs that are there now; nothing may change them, and nothing takes them away."""
    chosen = """SELECT job_id, "index", payload, prompt_tokens, completion_tokens, run_id, finished_at
                FROM outputs WHERE state = 'succeeded'"""
    with store.database.read() as connection:
        return {(row[0], row[1]): tuple(row[2:]) for row in connection.execute(text(chosen)).all()}


def changed(before: Mapping[tuple[str, int], tuple[Any, ...]], store: Store) -> list[str]:
    """A sentence for each output of `accepted` that is gone or another by now [I2]."""
    after = accepted(store)
    return [
        f"the output of job {job_id}, index {index}, {'has changed' if (job_id, index) in after else 'is gone'} [I2]"
        for (job_id, index), was in before.items()
        if after.get((job_id, index)) != was
    ]


def export_violations(
    lines: Iterable[str], *, texts: Mapping[int, str] | Iterable[str], errors: Mapping[int, str] | None = None
) -> list[str]:
    """A sentence for each thing wrong in exported JSONL: every index once, in order, with its text or its error.

    `texts`: what each index answers, the echo engine with its prompt; `errors`: the error code of those that fail.
    """
    errors = errors or {}
    wanted = dict(texts) if isinstance(texts, Mapping) else dict(enumerate(texts))
    rows = [json.loads(line) for line in lines]
    indexes = [row["index"] for row in rows]
    expected = sorted(wanted.keys() | errors.keys())
    times = Counter(indexes)
    found = [f"index {index} is not in the export" for index in expected if not times[index]]
    found += [f"index {index} is in the export {count} times" for index, count in times.items() if count > 1]
    found += [f"index {index} is in the export, and was not asked" for index in times if index not in set(expected)]
    if indexes != sorted(indexes):
        found.append("the export is not in file order")
    for row in rows:
        code = row["error"] and row["error"]["code"]
        if code != errors.get(row["index"]):
            found.append(f"index {row['index']} has the error {code}, and not {errors.get(row['index'])}")
        elif code is None and row["text"] != wanted.get(row["index"]):
            found.append(f"index {row['index']} answers {row['text']!r}, and not {wanted.get(row['index'])!r}")
    return found


def _found(connection: Connection, sentence: str, query: str, values: Mapping[str, Any]) -> Iterator[str]:
    used = {name: value for name, value in values.items() if f":{name}" in query}
    rows = connection.execute(text(query), used).mappings().all()
    yield from (sentence.format(**row) for row in rows[:_MOST_OF_A_KIND])
    if len(rows) > _MOST_OF_A_KIND:
        yield f"(and {len(rows) - _MOST_OF_A_KIND} more like the last)"


def _wrong_in_flight(connection: Connection) -> Iterator[str]:
    """Checks that requests in flight are in their batch and unanswered: else a crash would blame the wrong ones."""
    runs = connection.execute(text("SELECT id, batch_id, in_flight FROM runs WHERE finished_at IS NULL")).all()
    unanswered = text("""SELECT r."index" FROM requests r
        LEFT JOIN outputs o ON o.job_id = r.job_id AND o."index" = r."index"
        WHERE r.batch_id = :batch AND o.job_id IS NULL""")
    for run_id, batch_id, in_flight in runs:
        odd = set(json.loads(in_flight)) - set(connection.scalars(unanswered, {"batch": batch_id}))
        if odd:
            yield f"run {run_id} has {sorted(odd)} in flight, which do not wait in its batch {batch_id} [I5]"


def _wrong_error_codes(connection: Connection) -> Iterator[str]:
    for run_id, failed, codes in connection.execute(text("SELECT id, failed, error_codes FROM runs")).all():
        if sum(json.loads(codes).values()) != failed:
            yield f"run {run_id} says failed={failed} and the error codes {codes} [I9]"


def _misplaced(connection: Connection) -> Iterator[str]:
    asked = """SELECT r.job_id, r."index", r.body, b.id, b.adapter FROM requests r JOIN batches b ON b.id = r.batch_id
               WHERE b.adapter <> '' OR r.body LIKE '%"adapter":%'"""
    for job_id, index, body, batch_id, adapter in connection.execute(text(asked)).all():
        named = json.loads(body).get("adapter", "")
        if named != adapter:
            yield f"index {index} of job {job_id} names {named!r}, and its batch {batch_id} {adapter!r} [I10]"


def _mixed_meanings(connection: Connection) -> Iterator[str]:
    ran = """SELECT r.id, r.job_id, b.adapter, w.adapters AS held, j.adapters AS meant,
                    w.generation, r.worker_generation
             FROM runs r
             JOIN batches b ON b.id = r.batch_id JOIN workers w ON w.id = r.worker_id JOIN jobs j ON j.id = r.job_id
             WHERE b.adapter <> ''"""
    for run_id, job_id, adapter, held, meant, newest, generation in connection.execute(text(ran)).all():
        mine, wanted = (json.loads(each or "{}").get(adapter) for each in (held, meant))
        # The identity is known of the newest child alone, and not from before it was recorded.
        if mine and wanted and (newest != generation or not (mine.get("identity") and wanted.get("identity"))):
            mine, wanted = mine | {"identity": None}, wanted | {"identity": None}
        if mine is None or mine != wanted:
            yield f"run {run_id} held {mine} as {adapter!r}, and job {job_id} means {wanted} [I10]"


def _mixed_models(connection: Connection) -> Iterator[str]:
    ran = """SELECT r.id, w.identity, r.job_id, j.identity FROM runs r
             JOIN workers w ON w.id = r.worker_id AND w.generation = r.worker_generation JOIN jobs j ON j.id = r.job_id
             WHERE w.identity <> j.identity"""
    for run_id, held, job_id, wanted in connection.execute(text(ran)).all():
        yield f"run {run_id} held a model of {held}, and job {job_id} is of {wanted} [I11]"
