"""Names of models that are likely slips, as the commands about jobs ask about them (jobs.names tells them)."""

from __future__ import annotations

from jobs.names import meant_instead, slip_line

__all__ = ["meant_instead", "slip_line"]
