"""Logs and warnings of other libraries come out in one form, and a lost connection without a stack."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from pathlib import Path

import pytest
import redis

from batchmill.jobs.runtime.logs import FILE_ONLY, configure_logs, get_logger


@pytest.fixture(params=["console", "json"])
def logs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The stderr to which logs are written."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure_logs(level="info", form=request.param)
    return stderr


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


def test_a_lack_that_takes_nothing_away_is_not_told_as_a_fault(logs: io.StringIO) -> None:
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning(
        "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure", "no kernels"
    )
    assert logs.getvalue() == ""


def test_a_warning_is_a_line_of_the_log(logs: io.StringIO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)  # which the block above has undone
        warnings.warn("the device is old", stacklevel=1)
    assert "warning" in logs.getvalue()
    assert "UserWarning: the device is old" in logs.getvalue()


def test_the_file_is_told_what_stderr_is_told_and_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr, path = io.StringIO(), tmp_path / "a.log"
    monkeypatch.setattr(sys, "stderr", stderr)
    configure_logs(level="info", form="console", file=path)
    get_logger("a").info("said to both", job="abcdefgh")
    try:
        raise ValueError("a bug")
    except ValueError:
        get_logger("a").exception("failed")
    assert path.read_text() == stderr.getvalue() != ""
    get_logger(FILE_ONLY).error("said to the file", reason="as the user knows")
    assert "said to the file" not in stderr.getvalue()
    assert "as the user knows" in path.read_text()
