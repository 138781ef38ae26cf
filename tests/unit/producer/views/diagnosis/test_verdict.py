"""A diagnosis as JSON and as lines for people."""

from __future__ import annotations

from tests.support.diagnosis import AWAY, START, Place
from tests.support.store import mill


class TestWords:
    def test_the_json_has_its_keys_and_no_prompt(self, place: Place) -> None:
        job_id = mill.load(place.store, 3, name="nightly")
        said = place.diagnose(job_id, AWAY).to_json()
        assert list(said) == ["job", "state", "verdict", "findings"]
        assert (said["job"], said["state"], said["verdict"]) == (job_id, "queued", "stuck")
        assert all(list(each) == ["code", "message", "remedy"] for each in said["findings"])
        assert "prompt " not in str(said)

    def test_the_lines_begin_with_the_verdict_and_what_to_do(self, place: Place) -> None:
        job_id = mill.load(place.store, 3, name="nightly")
        place.later(4)
        assert place.diagnose(job_id).lines() == [
            f"job {job_id} (nightly) is stuck: no live worker serves echo (none), for 4 s",
            f"  -> start one: {START}",
            "  0 of 3 requests ended; 1 batch pending (the next one for 4 s), 0 held",
        ]

    def test_many_workers_are_counted_rather_than_named(self, place: Place) -> None:
        for number in range(5):
            mill.session(place.store, name=f"w{number}", ready=False)
        message = place.diagnose(mill.load(place.store, 3)).findings[0].message
        assert "and 2 more" in message
