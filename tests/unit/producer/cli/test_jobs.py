"""Commands about jobs and workers that exist: the workers that are listed."""

from __future__ import annotations

import json
from contextlib import closing
from socket import gethostname

from click.testing import CliRunner

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.runtime.process.process import Process
from batchmill.migrations.revisions import open_store
from batchmill.producer.cli.main import cli
from tests.support.store import mill


def test_a_worker_whose_process_has_ended_is_not_listed_as_alive(ended_process: Process) -> None:
    with closing(open_store(load_settings())) as store:
        for name, process in (("lives", Process.own()), ("ended", ended_process)):
            mill.session(store, name=name, process=process, host=gethostname())
        assert all(each.alive for each in store.workers.rows()), "the heartbeats of both are fresh"
    listed, everyone = (
        json.loads(CliRunner().invoke(cli, ["workers", "--json", *words]).stdout) for words in ([], ["--all"])
    )
    assert [each["name"] for each in listed] == ["lives"]
    assert {each["name"]: each["alive"] for each in everyone} == {"lives": True, "ended": False}
