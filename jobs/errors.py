"""One tree of errors. Each says the exit code of a command that it ends, and whether trying again can help.

    BatchmillError                 1   anything batchmill reports in one line
    |-- UsageError                 2   a flag, a setting or a file that the user has to change
    |   |-- SettingsError              a setting of the environment or of batchmill.toml
    |   |-- PromptFileError            bad lines of a prompt file, each named
    |   `-- KeyTaken                   another job was opened under this idempotency key
    |-- NotFound                   3   no such job
    |-- NotAllSucceeded            5   the job ended, and some of its requests did not succeed
    |-- WaitTimedOut             124   a wait ended before the job did
    |-- Interrupted              130   Ctrl-C
    |-- AlreadyRunning             1   another process holds what only one may hold
    |-- JobStateError              1   the job's state does not allow what was asked
    |-- LoadingLost                1   a submit's lease expired before its file was loaded
    |-- ModelError                 1   a model that cannot be loaded
    |-- WriteFailed                1   a file of the user's that could not be written
    |-- StoreError                 1   the database
    |   |-- StoreBusy            (r)   someone else is in the way
    |   |   |-- StoreLocked      (r)   locked by someone else for longer than the busy timeout
    |   |   |-- StoreConflict    (r)   the transaction was ended for another's sake
    |   |   `-- StoreCrowded     (r)   every connection of its server is taken
    |   |-- StoreUnavailable     (r)   not reachable, or the connection broke
    |   |-- StoreFull            (r)   no space left
    |   |-- StoreReplaced              its file is gone, or is another one
    |   `-- SchemaMismatch             its tables are of another revision
    `-- BrokerUnavailable        (r)   Redis is not reachable; a message may or may not have been sent

(r): trying again can help.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class BatchmillError(Exception):
    """Something that batchmill explains in one line; its text says what happened and what to do."""

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False


class UsageError(BatchmillError):
    """A flag, an argument or a file that its author has to change."""

    exit_code = 2


class SettingsError(UsageError):
    """A setting with a bad value or an unknown name; the text names it and where it stands."""


class PromptFileError(UsageError):
    """A prompt file that cannot be taken as it is.

    `problems` holds the first messages, each `file:line: what is wrong`; `count` is how many there are in all.
    """

    def __init__(self, message: str, *, problems: Sequence[str] = (), count: int = 0) -> None:
        super().__init__(message)
        self.problems = tuple(problems)
        self.count = count


class KeyTaken(UsageError):
    """Another job was opened under this idempotency key before.

    `job_id` is that job; `is_same` says whether it is of the same file, model and options.
    """

    def __init__(self, message: str, *, job_id: str, is_same: bool) -> None:
        super().__init__(message)
        self.job_id = job_id
        self.is_same = is_same


class NotFound(BatchmillError):
    """No job has this id, or several begin with it."""

    exit_code = 3


class NotAllSucceeded(BatchmillError):
    """The job ended, and some of its requests failed or were cancelled."""

    exit_code = 5


class WaitTimedOut(BatchmillError):
    """The job was still open when the time to wait for it was over."""

    exit_code = 124


class Interrupted(BatchmillError):
    """The user pressed Ctrl-C; what was finished is kept."""

    exit_code = 130


class AlreadyRunning(BatchmillError):
    """Another live process holds the lock; the text names its pid."""


class JobStateError(BatchmillError):
    """The job is in a state that does not allow what was asked."""


class LoadingLost(BatchmillError):
    """The lease of a loading job expired (the machine slept, say), and what it had stored was deleted."""


class ModelError(BatchmillError):
    """A model that cannot be loaded; the text says which and why."""


class WriteFailed(BatchmillError):
    """Answers, or other output of a command, that could not be written to a file or stdout; the text says why."""


class StoreError(BatchmillError):
    """The database refused or failed."""

    @property
    def hindrance(self) -> str:
        """The cause of a wait for the store, in a few words."""
        return "the store is away"


class StoreBusy(StoreError):
    """Someone else is in the way."""

    retryable = True

    @property
    def hindrance(self) -> str:
        return "the store is busy"


class StoreLocked(StoreBusy):
    """Someone else, `holder`, held the database's lock for longer than the busy timeout."""

    def __init__(self, message: str, *, holder: str) -> None:
        super().__init__(message)
        self.holder = holder

    @property
    def hindrance(self) -> str:
        return f"the store is locked by {self.holder}"


class StoreConflict(StoreBusy):
    """PostgreSQL ended the transaction, a deadlock's victim or one that it could not serialize; nothing was done."""


class StoreCrowded(StoreBusy):
    """The server has no connection left, for anybody or for this user; the text says what mends it."""


class StoreUnavailable(StoreError):
    """The database cannot be reached, or the connection broke on the way."""

    retryable = True


class StoreFull(StoreError):
    """The disk under the database is full."""

    retryable = True


class StoreReplaced(StoreError):
    """The file of a SQLite store was deleted or replaced while this process used it."""


class SchemaMismatch(StoreError):
    """The database's tables are of another revision than this batchmill works with."""


class BrokerUnavailable(BatchmillError):
    """Redis cannot be reached; what was being sent may or may not have arrived."""

    retryable = True
