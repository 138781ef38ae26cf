"""`run` beside an `up`: the worker there that may answer the file."""

from __future__ import annotations

from pathlib import Path
from socket import gethostname

import pytest
from click.testing import CliRunner

from batchmill.jobs.broker.embedded import MillLock
from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.store import Store
from batchmill.migrations.revisions import open_store
from batchmill.producer.cli.main import cli
from tests.support.store import mill


@pytest.fixture
def home_store() -> Store:
    """The embedded store of the test's own home."""
    return open_store(load_settings())


def test_a_worker_whose_process_has_ended_answers_no_file(
    home_store: Store, tmp_path: Path, ended_process: Process
) -> None:
    mill.session(home_store, process=ended_process, host=gethostname())
    assert home_store.workers.rows()[0].alive, "its heartbeat is fresh"
    home_store.close()
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x"}\n')
    with MillLock(load_settings().home):
        done = CliRunner().invoke(cli, ["run", str(file), "-m", "echo"])
    assert done.exit_code == 1, done.output
    assert "another `batchmill run` or `up` is at work" in done.output
