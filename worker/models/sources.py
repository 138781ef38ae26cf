"""The files that a model was loaded from, and the check that they still hold the same model.

A model whose files have changed begins no job: its answers would be stale. Some of the files are still read while the
model works: a CPU computes with unquantized weights where the operating system maps them from their file, and weights
that are offloaded to disk are read at every use. A write into such a file changes the answers of a model at work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from batchmill.jobs.errors import ModelError
from batchmill.jobs.models.identity import Content
from batchmill.jobs.runtime.logs import get_logger

log = get_logger(__name__)
_MAPS = Path("/proc/self/maps")


def read_on(contents: Iterable[Content], *, from_disk: bool) -> tuple[Content, ...]:
    """The contents of which this process has a file mapped into its memory; all if weights are read from disk."""
    if from_disk or not _MAPS.exists():
        return tuple(contents)
    mapped = _MAPS.read_bytes()  # in which links are followed
    return tuple(each for each in contents if any(os.fsencode(file.resolve()) in mapped for file in each.stamps))


class Sources:
    """The contents that one model, with its adapters, was loaded from.

    `at_work`: those of them that are read while it works.
    `give_up`: called with the reason why it can work no longer.
    """

    def __init__(
        self, contents: Iterable[Content], *, at_work: Iterable[Content] = (), give_up: Callable[[str], None]
    ) -> None:
        self._contents = list(contents)
        self._at_work = tuple(at_work)
        self._give_up = give_up

    def are_untouched(self) -> bool:
        """True where no file was written since; it costs a look at the times of a few files."""
        return all(each.untouched for each in self._contents)

    def changed(self) -> str | None:
        """Names the part of the model that has changed, None for none.

        Files that were only touched count as untouched from here on. None too where the files cannot be read yet, as
        while they are being copied.
        """
        for place, content in enumerate(self._contents):
            try:
                if (changed := content.changed()) is not None:
                    return changed
                if not content.untouched and content.again is not None:
                    self._contents[place] = content.again()
            except ModelError as error:
                log.warning("the model's files cannot be read; no job is begun", error=str(error))
                return None
        return None

    def are_whole(self) -> bool:
        """True where everything computed up to now is of the model that was loaded."""
        for content in self._at_work:
            try:
                changed = content.changed()
            except ModelError as error:
                changed = str(error)
            if changed is not None:
                self._give_up(f"the model's files were written while it worked ({changed}); start the worker again")
                return False
        return True
