"""Identity: what a model or an adapter is by its content, so that answers of two different ones are never mixed.

Owns which files of a folder count, and the spelling: `config=SHA-256 tokenizer=SHA-256 ...` of a folder, which tells
what changed, `commit=...` of a Hugging Face id, and `batchmill=VERSION` of echo. Equal identities are equal texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchmill.jobs.models.digests import Digests, Stamp

_CONFIG, _TOKENIZER, _TEMPLATE, _GENERATION, _WEIGHTS = "config", "tokenizer", "template", "generation", "weights"
_COMMIT, _BATCHMILL = "commit", "batchmill"
#: The names of the parts, for people.
_WORDS = {
    _CONFIG: "configuration",
    _TOKENIZER: "tokenizer",
    _TEMPLATE: "chat template",
    _GENERATION: "generation_config.json",
    _WEIGHTS: "weights",
    _COMMIT: "commit",
    _BATCHMILL: "version of batchmill",
}
_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
#: The files that transformers reads of a model's folder besides its weights. A tokenizer's files have many names.
_PATTERNS: Mapping[str, tuple[str, ...]] = {
    _CONFIG: ("config.json",),
    _GENERATION: ("generation_config.json",),
    _TEMPLATE: ("chat_template*", "additional_chat_templates/*.jinja", "chat_templates/*.jinja"),
    _TOKENIZER: (
        "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*vocab*.json", "vocab*.txt", "merges*.txt",
        "dict.txt", "*.model", "*.spm", "*.tiktoken", "*.codes", "*.tokenizer", "tekken.json", "byte_maps.json",
        "normalizer.json", "emoji.json", "word_*.json",
    ),
}  # fmt: skip
_OF_ADAPTER: Mapping[str, tuple[str, ...]] = {
    _CONFIG: ("adapter_config.json",),
    _WEIGHTS: ("adapter_model.safetensors",),
}


@dataclass(frozen=True, slots=True)
class Content:
    """An identity, and the files that it was read from."""

    identity: str
    #: The files as they were then; none for content that cannot change.
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)
    #: Reads the files anew; None for content that cannot change.
    again: Callable[[], Content] | None = None

    @property
    def untouched(self) -> bool:
        """True where no file was written since; files that were only touched, or copied, count as written here."""
        return all(_stamp(file) == stamp for file, stamp in self.stamps.items())

    def changed(self) -> str | None:
        """The parts that differ by now, for people; None where all are the same, though files were written or touched.

        Raises ModelError where that cannot be read.
        """
        if self.again is None or self.untouched:
            return None
        now = self.again().identity
        return None if now == self.identity else differences(self.identity, now)


def of_echo() -> Content:
    """The content of echo, the engine without a model, which is a part of batchmill."""
    from batchmill.jobs import VERSION

    return Content(f"{_BATCHMILL}={VERSION}")


def of_commit(commit: str) -> Content:
    """The content of a model or an adapter of the Hub, where a commit never changes."""
    return Content(f"{_COMMIT}={commit}")


def of_model(folder: Path, digests: Digests) -> Content:
    """The content of a model's folder. Raises ModelError where it cannot be read."""
    parts = _parts(folder, _PATTERNS) | {_WEIGHTS: _weights(folder)}
    return _content(folder, parts, digests, again=lambda: of_model(folder, digests))


def of_adapter(folder: Path, digests: Digests) -> Content:
    """The content of an adapter's folder. Raises ModelError where it cannot be read."""
    return _content(folder, _parts(folder, _OF_ADAPTER), digests, again=lambda: of_adapter(folder, digests))


def differences(before: str, now: str) -> str:
    """The differences between two identities, for people: `tokenizer and weights`."""
    old, new = (dict(part.split("=", 1) for part in each.split()) for each in (before, now))
    *rest, last = [_WORDS.get(each, each) for each in sorted(old.keys() | new.keys()) if old.get(each) != new.get(each)]
    return f"{', '.join(rest)} and {last}" if rest else last


def _content(
    folder: Path, parts: Mapping[str, Sequence[str]], digests: Digests, *, again: Callable[[], Content]
) -> Content:
    hashed = digests.of(folder, sorted({name for names in parts.values() for name in names}))
    spelled = [f"{part}={_joined([(name, hashed[name].sha256) for name in parts[part]])}" for part in sorted(parts)]
    return Content(" ".join(spelled), {folder / name: each.stamp for name, each in hashed.items()}, again)


def _joined(hashed: Sequence[tuple[str, str]]) -> str:
    """One digest of several files' names and digests."""
    return hashlib.sha256(json.dumps(sorted(hashed)).encode()).hexdigest()


def _parts(folder: Path, patterns: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The names of the files that are there, by part; a part without any is left out."""
    by_part = {
        part: sorted({str(each.relative_to(folder)) for one in globs for each in folder.glob(one) if each.is_file()})
        for part, globs in patterns.items()
    }
    return {part: names for part, names in by_part.items() if names}


def _weights(folder: Path) -> list[str]:
    """The one file of weights, or else the index and what it names beside it, as far as it is there."""
    if (folder / _ONE_FILE).is_file():
        return [_ONE_FILE]
    try:
        named = json.loads((folder / _INDEX).read_bytes())["weight_map"].values()
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return []  # the loader says what is wrong with it
    return [_INDEX, *sorted({each for each in named if _is_beside(folder, each)})]


def _is_beside(folder: Path, name: object) -> bool:
    return isinstance(name, str) and PurePosixPath(name).name == name and (folder / name).is_file()


def _stamp(file: Path) -> Stamp | None:
    # Imported here, since it brings the log's library, and `status` only compares texts.
    from batchmill.jobs.models.digests import Stamp

    try:
        return Stamp.of(file.stat())
    except OSError:
        return None
