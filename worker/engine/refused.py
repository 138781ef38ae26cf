"""The refusal of one request, raised wherever an engine finds that it cannot be answered."""

from __future__ import annotations

from batchmill.jobs.requests.request import ErrorCode


class Refused(Exception):
    """One request that cannot be answered; the text is for its user and holds nothing of the prompt."""

    def __init__(self, code: ErrorCode, message: str, *, prompt_tokens: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.prompt_tokens = prompt_tokens
