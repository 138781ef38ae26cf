"""The oracle sees every kind of harm: a sound store is broken by hand, one thing at a time, and it names it."""

from __future__ import annotations

import json
import re

import pytest
from sqlalchemy import text

from batchmill.jobs.store.store import Store
from tests.support.store import oracle
from tests.support.store.harm import sound, without_constraints
from tests.support.store.mill import begin, claim, load, session, work_off
from tests.support.store.oracle import accepted, changed, export_violations, violations

#: Statements that break a sound store, by the oracle's sentence.
CASES = {
    "has 2 outputs [I1]": 'INSERT INTO outputs SELECT * FROM outputs WHERE run_id = 1 AND "index" = 0',
    "is there 2 times [I4]": 'INSERT INTO requests SELECT * FROM requests WHERE batch_id = 5 AND "index" = 9',
    "has no request [I4]": 'DELETE FROM requests WHERE batch_id = 1 AND "index" = 3',
    "the lowest index 0, the highest 11 [I4]": 'DELETE FROM requests WHERE batch_id = 5 AND "index" = 9',
    "is completed and has 0 requests": "DELETE FROM requests WHERE batch_id IN (1, 2)",
    "is not a batch of this job [I5]": 'UPDATE requests SET batch_id = 1 WHERE batch_id = 5 AND "index" = 9',
    "has no output, and its batch 1 is done [I5]": 'DELETE FROM outputs WHERE run_id = 1 AND "index" = 0',
    "is completed, and its index 7 has no output [I6]": 'DELETE FROM outputs WHERE run_id = 2 AND "index" = 7',
    "is succeeded with the error oops": "UPDATE outputs SET error_code = 'oops' WHERE run_id = 2",
    "is succeeded with the error None and []": "UPDATE outputs SET payload = '[]' WHERE run_id = 2",
    "has total=5 and 4 requests [I4]": "UPDATE batches SET total = 5 WHERE id = 5",
    "says succeeded=3, its outputs say 2": "UPDATE batches SET succeeded = 3 WHERE id = 4",
    "says failed=1, its outputs say 0": "UPDATE batches SET failed = 1 WHERE id = 4",
    "says cancelled=1, its outputs say 0": "UPDATE batches SET cancelled = 1 WHERE id = 5",
    "says prompt_tokens=1, its outputs say 4": "UPDATE batches SET prompt_tokens = 1 WHERE id = 4",
    "says completion_tokens=1, its outputs say 6": "UPDATE batches SET completion_tokens = 1 WHERE id = 4",
    "is done with 2 of 4 answered": "UPDATE batches SET state = 'done' WHERE id = 4",
    "is pending with 4 of 4 answered": "UPDATE batches SET state = 'pending' WHERE id = 3",
    "says succeeded=4, its outputs say 2": "UPDATE runs SET succeeded = 4 WHERE id = 4",
    "says failed=3, its outputs say 4": "UPDATE runs SET failed = 3 WHERE id = 1",
    "is leased with worker=None": "UPDATE batches SET worker_id = NULL WHERE id = 4",
    "is leased with worker=1, generation=1, until=None": "UPDATE batches SET lease_until = NULL WHERE id = 4",
    "is pending with worker=1": "UPDATE batches SET worker_id = 1 WHERE id = 5",
    "is leased to generation 9 of worker 1, which has 1": "UPDATE batches SET worker_generation = 9 WHERE id = 4",
    "is leased to generation 1 of worker 7, which has None": "UPDATE batches SET worker_id = 7 WHERE id = 4",
    "is leased under fence 1 and has 0 open runs": "UPDATE runs SET worker_id = 2 WHERE id = 4",
    "batch 4 has 2 open runs": "UPDATE runs SET batch_id = 4, finished_at = NULL WHERE id = 3",
    "is open, and its batch 4 is pending": "UPDATE batches SET state = 'pending' WHERE id = 4",
    "run 4 has fence 2, and its batch 4 has 1": "UPDATE runs SET fence = 2 WHERE id = 4",
    "run 3 has fence 0": "UPDATE runs SET fence = 0 WHERE id = 3",
    "batch 3 has 2 runs of fence 1": "INSERT INTO runs SELECT * FROM runs WHERE id = 3",
    "batch 3 has fence 2 and 1 runs": "UPDATE batches SET fence = 2 WHERE id = 3",
    "which is not a run of this job": "UPDATE outputs SET run_id = 1 WHERE run_id = 3",
    "is cancelled, of run 1": "UPDATE outputs SET state = 'cancelled' WHERE run_id = 1",
    "is failed, of run None": "UPDATE outputs SET run_id = NULL WHERE run_id = 1",
    "run 3 is of job nobody's": "UPDATE runs SET job_id = 'nobody''s' WHERE id = 3",
    "run 3 began after it ended": "UPDATE runs SET started_at = finished_at + 1 WHERE id = 3",
    "run 2 of batch 1 began before the run ahead of it": "UPDATE runs SET batch_id = 1, fence = 2, started_at = 1"
    " WHERE id = 2",
    "was written while its run 3 was not open": "UPDATE outputs SET finished_at = finished_at + 9 WHERE run_id = 3",
    "has 1 crashes and 20 requests": "UPDATE batches SET crashes = 1, total = 20 WHERE id = 5",
    "has 5 crashes": "UPDATE batches SET crashes = 5 WHERE id = 5",
    "is completed with 1 pending, 1 leased and 1 ended": "UPDATE jobs SET state = 'completed' WHERE state = 'running'",
    "is running with 0 pending, 0 leased": "UPDATE jobs SET state = 'running' WHERE state = 'completed'",
    "is queued with 1 pending, 1 leased": "UPDATE jobs SET state = 'queued' WHERE state = 'running'",
    "is loading with 1 pending, 1 leased": "UPDATE jobs SET state = 'loading' WHERE state = 'running'",
    "finished_at=None": "UPDATE jobs SET finished_at = NULL WHERE state = 'completed'",
    "started_at=None": "UPDATE jobs SET started_at = NULL WHERE state = 'running'",
    "spec=None": "UPDATE jobs SET spec = NULL WHERE state = 'running'",
    "4 of its outputs are cancelled": "UPDATE outputs SET state = 'cancelled' WHERE run_id = 1",
    "run 4 has [99] in flight, which do not wait in its batch 4": "UPDATE runs SET in_flight = '[6, 99]' WHERE id = 4",
    'the error codes {"engine_error": 3}': """UPDATE runs SET error_codes = '{"engine_error": 3}' WHERE id = 1""",
}


def test_each_harm_is_named_and_each_check_finds_one(store: Store) -> None:
    sound(store)
    assert violations(store, closed=False) == []
    with without_constraints(store) as harmed:
        found = {}
        for case, harm in CASES.items():
            with harmed(harm):
                found[case] = violations(store, closed=False)
    unnamed = {case: said for case, said in found.items() if not any(case in each for each in said)}
    assert unnamed == {}
    everything = "\n".join(sentence for said in found.values() for sentence in said)
    idle = [sentence for sentence, _ in oracle._ALWAYS if not re.search(pattern_of(sentence), everything)]
    assert idle == []
    assert violations(store, closed=False) == []


def pattern_of(sentence: str) -> str:
    return re.sub(r"\\\{\w+\\\}", ".*", re.escape(sentence))


def test_what_is_open_is_named_once_all_should_have_ended(store: Store) -> None:
    sound(store)
    begin(store)
    found = violations(store)
    assert len(found) == 3
    assert "is running, not closed" in found[0]
    assert "is loading under a lease that holds" in found[1]
    assert found[2] == "batch 4 is still leased to worker 1"
    assert violations(store, closed=False) == []


def test_many_violations_of_a_kind_are_cut_short(store: Store) -> None:
    load(store, 40)
    work_off(store, session(store))
    with store.database.write() as connection:
        connection.execute(text("UPDATE outputs SET payload = '[]'"))
    found = violations(store)
    assert len(found) == 11
    assert found[-1] == "(and 30 more like the last)"


def test_cancelled_retried_and_crashed_jobs_are_sound(store: Store) -> None:
    who = session(store)
    job_id = load(store, 12)
    claim(store, who)
    store.closing.cancel(job_id)
    assert violations(store, closed=False) == []
    store.recovery.take_back(who.worker_id, generation=1)
    assert violations(store, closed=False) == []
    store.closing.close_finished()
    assert violations(store) == []
    store.retries.retry(job_id)
    assert violations(store, closed=False) == []
    claim(store, who, room=2)
    store.recovery.take_back(who.worker_id, generation=1)
    assert violations(store, closed=False) == []
    work_off(store, who)
    assert violations(store) == []


def test_an_output_that_changes_or_goes_is_seen_between_two_looks(store: Store) -> None:
    sound(store)
    before = accepted(store)
    assert changed(before, store) == []
    with store.database.write() as connection:
        connection.execute(text("""UPDATE outputs SET payload = '["other"]' WHERE run_id = 3 AND "index" = 0"""))
        connection.execute(text('DELETE FROM outputs WHERE run_id = 3 AND "index" = 1'))
    said = changed(before, store)
    assert [each.partition(", ")[2] for each in sorted(said)] == ["index 0, has changed [I2]", "index 1, is gone [I2]"]


def line(index: int, text: str | None, error: str | None = None) -> str:
    return json.dumps({"index": index, "text": text, "error": error and {"code": error, "message": ""}})


WHOLE = [line(0, "a"), line(1, None, "poison"), line(2, "c")]


def test_a_whole_export_has_no_violation() -> None:
    assert export_violations(WHOLE, texts=["a", "!kill9", "c"], errors={1: "poison"}) == []


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (WHOLE[:2], "index 2 is not in the export"),
        ([*WHOLE, WHOLE[2]], "index 2 is in the export 2 times"),
        ([*WHOLE, line(3, "d")], "index 3 is in the export, and was not asked"),
        ([WHOLE[1], WHOLE[0], WHOLE[2]], "the export is not in file order"),
        ([line(0, "b"), *WHOLE[1:]], "index 0 answers 'b', and not 'a'"),
        ([line(0, None, "poison"), *WHOLE[1:]], "index 0 has the error poison, and not None"),
        ([WHOLE[0], line(1, "!kill9"), WHOLE[2]], "index 1 has the error None, and not poison"),
    ],
)
def test_each_harm_of_an_export_is_named(lines: list[str], said: str) -> None:
    assert said in export_violations(lines, texts={0: "a", 2: "c"}, errors={1: "poison"})
