"""Diagnoses of jobs in a store by a clock, and the findings that they are expected to have."""

from __future__ import annotations

from dataclasses import dataclass

from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.store.leases.lease import WorkerSession
from batchmill.jobs.store.store import Store
from batchmill.producer.views.diagnosis.findings import Finding
from batchmill.producer.views.diagnosis.snapshot import QueueState
from batchmill.producer.views.diagnosis.verdict import Diagnosis, Verdict, diagnose
from batchmill.producer.views.status import JobStatus
from tests.support.store import mill

LLAMA = ModelSpec("org/llama", None, Quantization(Kind.NF4))
AWAY = QueueState(error="Redis at redis://mill/0 is not reachable: Connection refused")
START = "batchmill worker -m echo"


@dataclass
class Place:
    """A store by a clock, and the diagnoses of its jobs."""

    store: Store
    clock: mill.Clock

    def diagnose(self, job_id: str, queue: QueueState | None = None, *, external: bool = True) -> Diagnosis:
        settings = Settings(broker_url="redis://mill/0") if external else Settings()
        return diagnose(JobStatus.read(self.store, job_id, settings), self.store, queue or QueueState(), settings)

    def later(self, seconds: float, *beating: WorkerSession) -> None:
        """Time passes; these workers live on."""
        self.clock.seconds += seconds
        for each in beating:
            self.store.registration.heartbeat(each.worker_id, beat=5.0)


def finding(diagnosis: Diagnosis, code: str) -> Finding:
    found = [each for each in diagnosis.findings if each.code == code]
    assert found, [each.code for each in diagnosis.findings]
    return found[0]


def expect(diagnosis: Diagnosis, verdict: Verdict, reason: str) -> Finding:
    assert (diagnosis.verdict, diagnosis.findings[0].code) == (verdict, reason)
    assert diagnosis.exit_code == (verdict is Verdict.STUCK)
    return diagnosis.findings[0]
