"""The guards that keep the invariants, by the room of their code: `MUTANTS` holds the mutants of all rooms.

Data alone. An edit's text has to stand in its file exactly once; one that is found no more fails the run, so that
nobody moves a guard and leaves its mutant behind.
"""

from __future__ import annotations

from tests.tools.mutants.guards.database import DATABASE
from tests.tools.mutants.guards.jobs import JOBS
from tests.tools.mutants.guards.leases import LEASES
from tests.tools.mutants.guards.migrations import MIGRATIONS
from tests.tools.mutants.guards.producer import PRODUCER
from tests.tools.mutants.guards.src import SRC
from tests.tools.mutants.guards.store import STORE
from tests.tools.mutants.guards.worker import WORKER
from tests.tools.mutants.mutant import Mutant

_ROOMS = (DATABASE, LEASES, STORE, JOBS, WORKER, PRODUCER, MIGRATIONS, SRC)
MUTANTS: tuple[Mutant, ...] = tuple(each for room in _ROOMS for each in room)
