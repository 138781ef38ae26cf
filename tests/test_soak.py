"""What the soak changes of batchmill must still be there: it runs for an hour, and seldom."""

from __future__ import annotations

import pytest

from batchmill.jobs.models import spec
from batchmill.jobs.models.spec import ModelSpec
from tests.soak.worker import let_echo_have_twins


def test_echo_has_a_second_queue_in_the_soak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "_quantization_of", spec._quantization_of)
    let_echo_have_twins()
    parsed = [ModelSpec.parse("echo", quantization=each) for each in (None, "nf4")]
    assert [str(each.quantization) for each in parsed] == ["none", "nf4"]
    assert parsed[0].queue("a") != parsed[1].queue("a")
