"""What other libraries log comes out in one form, and a lost connection without a stack."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest
import redis

from jobs.logs import configure_logs
from jobs.settings import load_settings


@pytest.fixture(params=["console", "json"])
def logs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is logged."""
    root = logging.getLogger()
    before = (root.handlers, root.level)
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure_logs(load_settings(log_format=request.param))
    yield stderr
    root.handlers, root.level = before


@pytest.mark.parametrize("error", [redis.ConnectionError("refused by 7"), BrokenPipeError(32, "refused by 7")])
def test_a_lost_connection_is_told_in_one_line(error: Exception, logs: io.StringIO) -> None:
    try:
        raise error
    except Exception:
        logging.getLogger("celery.worker.consumer").exception("Connection to broker lost")
    (line,) = logs.getvalue().splitlines()
    assert "Connection to broker lost" in line
    assert "refused by 7" in line


def test_any_other_error_keeps_its_stack(logs: io.StringIO) -> None:
    try:
        raise ValueError("a bug")
    except ValueError:
        logging.getLogger("celery.worker").exception("Unrecoverable error")
    assert "test_any_other_error_keeps_its_stack" in logs.getvalue()
