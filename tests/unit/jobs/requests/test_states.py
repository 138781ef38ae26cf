"""The legal transitions."""

from __future__ import annotations

from batchmill.jobs.requests.states import BATCH_BEFORE, JOB_BEFORE, BatchState, JobState


def test_every_state_but_the_first_can_be_entered_and_loading_never_again() -> None:
    assert set(JOB_BEFORE) == set(JobState) - {JobState.LOADING}
    assert set(BATCH_BEFORE) == set(BatchState)
