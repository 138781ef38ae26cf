"""The names of batchmill that the soak patches must still exist: it runs for an hour, and seldom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from batchmill.jobs.broker.queue_name import queue_name
from batchmill.jobs.models import spec
from batchmill.jobs.models.spec import ModelSpec
from tests.tools.soak.measures import CONTAINER, Measures
from tests.tools.soak.worker import let_echo_have_twins
from tests.tools.soak.world import World


def test_echo_has_a_second_queue_in_the_soak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "_quantization_of", spec._quantization_of)
    let_echo_have_twins()
    parsed = [ModelSpec.parse("echo", quantization=each) for each in (None, "nf4")]
    assert [str(each.quantization) for each in parsed] == ["none", "nf4"]
    assert queue_name(parsed[0], "a") != queue_name(parsed[1], "a")


@pytest.mark.parametrize(("scope", "is_late"), [("clock", False), ("redis", True)])
def test_leases_that_the_clock_moved_may_be_taken_back_late(scope: str, is_late: bool) -> None:
    """They were renewed, to whoever watches them expire; Redis is not needed for it."""
    problems: list[str] = []
    world = SimpleNamespace(note=lambda *_args, **_details: None, problem=problems.append)
    found = Measures(cast(World, world))
    found.watch(CONTAINER, lambda: True)
    [watch] = found._watches
    watch.began -= 123.5
    breakage = found.broken(scope)
    breakage.began -= 31
    breakage.ended = breakage.began
    found.poll()
    assert bool(problems) is is_late
    assert [each.excused for each in found.found] == [() if is_late else (scope,)]
