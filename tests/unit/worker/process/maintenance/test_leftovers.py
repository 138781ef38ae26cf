"""The outputs of a dead child's spool: saved in pages."""

from __future__ import annotations

from batchmill.jobs.store.bounds import PAGE_BYTES
from batchmill.jobs.store.leases.lease import BatchReport, Lease
from batchmill.worker.process.maintenance.leftovers import _pages
from tests.support.store import mill

LEASE = Lease(3, 1, 5, "job")


def test_large_outputs_are_saved_in_pages_by_their_bytes() -> None:
    half = "x" * (PAGE_BYTES // 2)
    report = BatchReport(LEASE, outputs=[mill.output("job", index, text=half) for index in range(3)])
    pages = list(_pages([report]))
    assert [[each.key.index for each in page.outputs] for page in pages] == [[0, 1], [2]]
    assert {page.lease for page in pages} == {LEASE}
