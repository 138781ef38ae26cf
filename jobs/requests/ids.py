"""The ids of jobs."""

from __future__ import annotations

import secrets

#: Letters and digits that cannot be taken for one another when a job's id is typed.
ID_ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"
ID_LENGTH = 8


def new_job_id() -> str:
    """A job's id: short, lower case, random."""
    return "".join(secrets.choice(ID_ALPHABET) for _ in range(ID_LENGTH))
