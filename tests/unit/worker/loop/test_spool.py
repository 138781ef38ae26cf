"""Outputs that wait on disk while the store is away: their lines, a crash, and the worker that saves them."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import URL, make_url, update
from structlog.testing import capture_logs

from batchmill.jobs.configuration.settings import Settings, load_settings
from batchmill.jobs.requests.generation import Choice
from batchmill.jobs.requests.request import ErrorCode, Output, RequestKey, Timings
from batchmill.jobs.requests.states import JobState, RunOutcome
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.leases.lease import BatchReport, Lease
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import workers
from batchmill.worker.loop import spool
from batchmill.worker.loop.spool import NewerSpool, Spool, Spools, abandoned, read
from batchmill.worker.process.maintenance import leftovers
from batchmill.worker.process.maintenance.leftovers import Leftovers
from tests.support.store import mill
from tests.support.store.oracle import violations

LEASE = Lease(3, 1, 5, "job", apart=True)
HOST = socket.gethostname()
#: Lines as they were written: of before outputs had timings, by commit 480f1b7, and of before a lease was named.
OLDEST = (
    '{"lease":[3,1,5,"job",true],"in_flight":[1],"outputs":[{"key":["job",0],"choices":[{"text":"a",'
    '"finish_reason":"stop"}],"prompt_tokens":2,"completion_tokens":3,"error":null}]}'
)
FORM_1 = (
    '{"lease":[3,1,5,"job",true],"in_flight":[1],"outputs":[{"key":["job",0],"choices":[{"text":"a",'
    '"finish_reason":"stop","logprobs":null}],"prompt_tokens":2,"completion_tokens":3,"error":null,'
    '"timings":{"queued_seconds":0.0,"prefill_seconds":0.25,"decode_seconds":1.5}}]}'
)
FORM_2 = (
    '{"format":2,"lease":[3,1,5,"job",true],"in_flight":[1],"outputs":[{"key":["job",0],"choices":[{"text":"a",'
    '"finish_reason":"stop","logprobs":null,"tool_calls":null,"content":null}],"prompt_tokens":2,'
    '"completion_tokens":3,"error":null,"timings":{"queued_seconds":0.0,"prefill_seconds":0.25,'
    '"decode_seconds":1.5}}]}'
)


def own() -> Process:
    process = Process.own()
    assert process is not None
    return process


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool" / "x-1-1.jsonl"


def spools(store: Store, settings: Settings) -> Spools:
    return Spools(settings.home, store.id, database=settings.database)


def fall_silent(store: Store) -> None:
    """All workers have missed their heartbeats."""
    with store.database.write() as connection:
        connection.execute(update(workers).values(alive_until=workers.c.alive_until - 3_600))


def held(*indexes: int, in_flight: tuple[int, ...] = ()) -> BatchReport:
    return BatchReport(LEASE, outputs=[mill.output("job", index) for index in indexes], in_flight=in_flight)


def test_what_is_appended_is_read_once_with_the_last_in_flight(path: Path) -> None:
    own = Spool(path, limit_bytes=10_000)
    assert own.append([held(0, in_flight=(1, 2))])
    assert own.append([held(0, 1, in_flight=(2, 3))])
    size = path.stat().st_size
    assert own.append([held(0, 1, in_flight=(2, 3))])
    assert path.stat().st_size == size
    failed = mill.output("job", 2, error=ErrorCode.OUT_OF_MEMORY)
    assert own.append([BatchReport(LEASE, outputs=[mill.output("job", 0), mill.output("job", 1), failed])])
    (found,) = read(path)
    assert found == BatchReport(LEASE, outputs=[mill.output("job", 0), mill.output("job", 1), failed], in_flight=[])
    own.clear()
    assert not path.exists()


def test_a_line_that_a_crash_cut_off_is_left_out(path: Path) -> None:
    Spool(path, limit_bytes=10_000).append([held(0, in_flight=(1,))])
    with path.open("ab") as file:
        file.write(b'{"lease":[3,1,5,"jo')
    assert read(path) == [held(0, in_flight=(1,))] or read(path)[0].outputs == [mill.output("job", 0)]
    assert len(read(path)[0].outputs) == 1


@pytest.mark.parametrize("line", [OLDEST, FORM_1, FORM_2])
def test_what_an_older_batchmill_spooled_is_read(path: Path, line: str) -> None:
    path.parent.mkdir()
    path.write_text(f"{line}\n")
    timings = None if line is OLDEST else Timings(0.0, 0.25, 1.5)
    output = replace(mill.output("job", 0, text="a"), timings=timings)
    assert read(path) == [BatchReport(LEASE, outputs=[output], in_flight=[1])]


def test_it_is_written_by_name_and_says_its_form(path: Path) -> None:
    Spool(path, limit_bytes=10_000).append([held(0)])
    line = json.loads(path.read_text())
    assert line["format"] == 3
    assert line["lease"] == {
        "batch_id": 3,
        "fence": 1,
        "run_id": 5,
        "job_id": "job",
        "apart": True,
        "kind": "generation",
    }


def test_a_newer_form_is_not_read(path: Path) -> None:
    Spool(path, limit_bytes=10_000).append([held(0)])
    path.write_text(path.read_text().replace('"format":3', '"format":4'))
    with pytest.raises(NewerSpool):
        read(path)


def test_timings_and_every_choice_are_read_back(path: Path) -> None:
    choices = (Choice("a", "stop", {"content": []}), Choice("b", "length"))
    output = Output(RequestKey("job", 0), choices, 2, 3, timings=Timings(0.0, 0.25, 1.5))
    assert Spool(path, limit_bytes=10_000).append([BatchReport(LEASE, outputs=[output])])
    assert read(path)[0].outputs == [output]


def test_it_is_bounded_and_says_when_it_is_full(path: Path) -> None:
    own = Spool(path, limit_bytes=400)
    assert own.append([held(0)])
    assert not own.append([held(*range(20))])
    assert path.stat().st_size <= 400
    assert len(read(path)[0].outputs) == 1


def test_a_disk_without_space_counts_as_full_and_is_used_again_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Spool(path, limit_bytes=10_000)
    own.append([held(0)])
    real = os.write

    def half(descriptor: int, data: memoryview) -> int:
        real(descriptor, data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool.os, "write", half)
    assert not own.append([held(0, 1)])
    monkeypatch.setattr(spool.os, "write", real)
    assert own.append([held(0, 1)])
    assert [each.key.index for each in read(path)[0].outputs] == [0, 1]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_nobody_else_can_read_it(path: Path) -> None:
    Spool(path, limit_bytes=10_000).append([held(0)])
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


def test_abandoned_spools_are_found_by_their_age(path: Path) -> None:
    Spool(path, limit_bytes=10_000).append([held(0)])
    home = path.parent.parent
    assert abandoned(home, older_than_seconds=60) == []
    os.utime(path, (time.time() - 120,) * 2)
    assert abandoned(home, older_than_seconds=60) == [path]


class TestLeftovers:
    """A dead child's spool is saved under its fences before its leases are taken back."""

    @pytest.fixture
    def settings(self, store_url: str) -> Settings:
        return load_settings(database_url=store_url)

    def died(
        self,
        store: Store,
        settings: Settings,
        *,
        host: str = "host",
        process: Process | None = None,
        path: Path | None = None,
    ) -> tuple[str, mill.Seat]:
        """A child that answered 0 to 4 of 20 requests, had 5 to 9 in flight, and died while the store was away."""
        job_id = mill.load(store, 20, batch_size=20)
        who = mill.session(store, host=host, process=process)
        (claimed,) = mill.claim(store, who, room=8)
        path = path or spools(store, settings).path(who.worker_id, who.generation)
        answers = [mill.output(job_id, index) for index in range(5)]
        Spool(path, limit_bytes=10_000).append([BatchReport(claimed.lease, outputs=answers, in_flight=range(5, 10))])
        return job_id, who

    def test_the_outputs_are_kept_and_who_was_in_flight_is_blamed(self, store: Store, settings: Settings) -> None:
        job_id, who = self.died(store, settings)
        assert Leftovers(store, settings).settle(who.worker_id, who.generation) == 1
        assert store.jobs.job(job_id).counts.succeeded == 5
        assert list((settings.home / "spool").iterdir()) == []
        next_one = mill.session(store, name="next")
        (suspects,) = mill.claim(store, next_one)
        assert [each.index for each in suspects.requests] == list(range(5, 10))
        assert suspects.lease.apart
        mill.save(store, next_one, [mill.answered(suspects)])
        (rest,) = mill.claim(store, next_one)
        assert [each.index for each in rest.requests] == list(range(10, 20))
        mill.save(store, next_one, [mill.answered(rest)])
        assert store.jobs.job(job_id).state is JobState.COMPLETED
        assert violations(store) == []

    def test_a_spool_whose_fence_is_lost_writes_nothing(self, store: Store, settings: Settings) -> None:
        job_id, who = self.died(store, settings)
        store.recovery.take_back(who.worker_id, generation=who.generation, outcome=RunOutcome.RELEASED)
        Leftovers(store, settings).settle(who.worker_id, who.generation)
        assert store.jobs.job(job_id).counts.succeeded == 0
        assert list((settings.home / "spool").iterdir()) == []

    def test_orphans_of_this_host_are_settled_at_once_by_whoever_comes_next(
        self, store: Store, settings: Settings
    ) -> None:
        """As in a container that has restarted: its worker has the pid, the host and the home of the dead one."""
        mine = own()
        job_id, _ = self.died(store, settings, process=replace(mine, start_ticks=mine.start_ticks - 1), host=HOST)
        left = Leftovers(store, settings)
        assert left.settle_orphans() == 1
        assert left.settle_orphans() == 0
        assert store.jobs.job(job_id).counts.succeeded == 5

    @pytest.mark.parametrize(
        ("host", "known"),
        [(HOST, {}), (HOST, {"namespace": 1}), (HOST, None), ("another", {"start_ticks": 1})],
        ids=["lives", "another container", "unknown", "another host"],
    )
    def test_nobody_is_taken_for_dead_of_whom_it_is_not_known(
        self, store: Store, settings: Settings, host: str, known: dict[str, int] | None
    ) -> None:
        job_id, _ = self.died(store, settings, process=None if known is None else replace(own(), **known), host=host)
        assert Leftovers(store, settings).settle_orphans() == 0
        assert store.jobs.job(job_id).counts.succeeded == 0
        assert len(list((settings.home / "spool").iterdir())) == 1

    def test_a_worker_of_an_earlier_boot_is_dead_once_it_is_silent(self, store: Store, settings: Settings) -> None:
        """Another machine of this name, which is alive, has another boot, too."""
        before = replace(own(), boot_id="00000000-0000-0000-0000-000000000000")
        job_id, _ = self.died(store, settings, process=before, host=HOST)
        left = Leftovers(store, settings)
        assert left.settle_orphans() == 0
        left._silent_seconds = 0.0
        assert left.settle_orphans() == 1
        assert store.jobs.job(job_id).counts.succeeded == 5

    @pytest.mark.parametrize("change", ["a new password", "a new host name"])
    def test_the_spool_is_found_whatever_the_url_says_by_then(
        self, store: Store, settings: Settings, change: str, tmp_path: Path
    ) -> None:
        job_id, who = self.died(store, settings)
        url = _other_url(make_url(settings.database), change, tmp_path)
        later = Store(url)
        Leftovers(later, load_settings(database_url=url)).settle(who.worker_id, who.generation)
        later.close()
        assert store.jobs.job(job_id).counts.succeeded == 5
        assert list((settings.home / "spool").iterdir()) == []

    def test_a_spool_that_is_named_as_it_once_was_is_found(self, store: Store, settings: Settings) -> None:
        digest = hashlib.sha256(settings.database.encode()).hexdigest()[:8]
        job_id, who = self.died(store, settings, path=settings.home / "spool" / f"{digest}-1-1.jsonl")
        assert (who.worker_id, who.generation) == (1, 1)
        Leftovers(store, settings).settle(1, 1)
        assert store.jobs.job(job_id).counts.succeeded == 5
        assert list((settings.home / "spool").iterdir()) == []

    def test_a_spool_of_another_store_is_left_alone(self, store: Store, settings: Settings) -> None:
        self.died(store, settings, path=Spools(settings.home, "0" * 32, database="sqlite:///x.db").path(1, 1))
        left = Leftovers(store, settings)
        left.settle(1, 1)
        fall_silent(store)
        left.settle_orphans()
        assert len(list((settings.home / "spool").iterdir())) == 1

    @pytest.mark.parametrize("known", [None, {"namespace": 1}], ids=["unknown", "another container"])
    def test_of_a_silent_worker_of_which_nothing_is_known_the_answers_are_saved_and_nobody_is_blamed(
        self, store: Store, settings: Settings, known: dict[str, int] | None
    ) -> None:
        job_id, who = self.died(store, settings, process=None if known is None else replace(own(), **known))
        left = Leftovers(store, settings)
        left.settle_orphans()
        assert store.jobs.job(job_id).counts.succeeded == 0
        fall_silent(store)
        assert left.settle_orphans() == 0
        assert store.jobs.job(job_id).counts.succeeded == 5
        assert list((settings.home / "spool").iterdir()) == []
        assert store.recovery.take_back(who.worker_id, generation=1, outcome=RunOutcome.RELEASED) == 1  # still held
        assert violations(store, closed=False) == []

    def test_a_silent_worker_that_lives_keeps_its_spool(self, store: Store, settings: Settings) -> None:
        self.died(store, settings, process=own())
        fall_silent(store)
        Leftovers(store, settings).settle_orphans()
        assert len(list((settings.home / "spool").iterdir())) == 1

    def test_a_spool_of_a_newer_batchmill_is_left_to_it(self, store: Store, settings: Settings) -> None:
        _, who = self.died(store, settings)
        (path,) = (settings.home / "spool").iterdir()
        path.write_text(path.read_text().replace('"format":3', '"format":4'))
        with capture_logs() as said:
            Leftovers(store, settings).settle(who.worker_id, who.generation)
        assert path.exists()
        assert "a spool of a newer batchmill is left to it" in [each["event"] for each in said]

    def test_a_spool_of_thousands_is_saved_in_pages(
        self, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(leftovers, "_PAGE_OUTPUTS", 2)
        job_id, who = self.died(store, settings)
        Leftovers(store, settings).settle(who.worker_id, who.generation)
        assert store.jobs.job(job_id).counts.succeeded == 5


def _other_url(url: URL, change: str, folder: Path) -> str:
    """Another URL of the same store, as it may be after an outage."""
    if url.get_backend_name() == "sqlite":
        link = folder / "link"
        link.symlink_to(Path(str(url.database)).parent)
        other = url.set(database=f"{link}/{Path(str(url.database)).name}")
    elif change == "a new password":
        other = url.set(password="changed")  # the server asks local users for none
    else:
        (folder / "moved").symlink_to(str(url.query["host"]))
        other = url.update_query_dict({"host": str(folder / "moved")})
    written = other.render_as_string(hide_password=False)
    assert written != url.render_as_string(hide_password=False)
    return written
