"""The files of a Hugging Face repository that are needed: a model's, or an adapter's, and nothing beside them.

Weights are safetensors, in one form of those that a repository holds; pickles and code never come to this machine. It
knows names of files; worker.models.hub.client brings them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from batchmill.jobs.errors import ModelError
from batchmill.jobs.models.folder import ADAPTER_CONFIG
from batchmill.worker.models.hub import client as hub
from batchmill.worker.models.hub.client import Listing, TensorHeader
from batchmill.worker.models.hub.errors import HubUnreachable
from batchmill.worker.models.vetting import ADAPTER_WEIGHTS, WEIGHTS, WEIGHTS_INDEX, Refusal, shard_names, weights

_CONFIG = "config.json"
_FILES_OF_ADAPTER = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
#: The files of a model beside its weights: configuration, vocabularies and chat templates.
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "additional_chat_templates/*.jinja")
#: Those of them that go with weights in other forms.
_OF_OTHER_FORMS = ("*.index.json", "params.json")
#: A tokenizer is read from at least one of these.
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

#: Called before a fetch with the number of files to come, and their bytes.
Announce = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Pulled:
    """A repository in this machine's cache."""

    folder: Path
    commit: str
    #: The files that were wanted.
    files: tuple[str, ...]
    #: Their bytes.
    bytes: int
    #: Bytes that came just now.
    fetched_bytes: int = 0
    #: False where the Hub was not asked, or not reached: the files were here before.
    asked: bool = True


def pull(name: str, revision: str | None, *, announce: Announce) -> Pulled:
    """Brings a model, or an adapter, into the cache, as the Hub has it now at this revision.

    A Hub that cannot be reached does no harm to a model that is here whole. Raises ModelError, before anything large is
    fetched where the repository holds nothing that can be loaded.
    """
    try:
        listing = hub.look_up(name, revision)
    except HubUnreachable:
        here = cached_model(name, revision) or _cached_adapter(name, revision)
        if here is None:
            raise
        return _here(here)
    if _is_adapter(listing.files):
        return _fetched(listing, _FILES_OF_ADAPTER, announce)
    return _fetched(listing, _files_of_model(listing), announce)


def find_model(name: str, revision: str | None, *, announce: Announce) -> Pulled:
    """Finds a model in the cache, with no request to anyone, or else fetches its missing files. Raises ModelError."""
    here = cached_model(name, revision)
    if here is not None:
        return _here(here)
    listing = hub.look_up(name, revision)
    return _fetched(listing, _files_of_model(listing), announce)


def find_adapter(name: str, revision: str | None, *, announce: Announce) -> Pulled:
    """Finds an adapter in the cache, or else fetches its configuration and weights alone. Raises ModelError."""
    here = _cached_adapter(name, revision)
    if here is not None:
        return _here(here)
    listing = hub.look_up(name, revision)
    absent = [file for file in _FILES_OF_ADAPTER if file not in listing.files]
    if absent:
        raise ModelError(f"{name} is no adapter: it has no {absent[0]}; save it with peft as safetensors")
    return _fetched(listing, _FILES_OF_ADAPTER, announce)


def cached_model(name: str, revision: str | None) -> Path | None:
    """The folder of the cache with all files that a model's loading needs, at this revision as written.

    No request goes out: a worker starts with no network, and keeps its model until `models pull` brings a newer one.
    """
    folder = hub.cached_folder(name, revision)
    if folder is None or not (folder / _CONFIG).is_file():
        return None
    try:
        weights(folder)
    except Refusal:
        return None
    # Other programs fetch the tokenizer last.
    return folder if any((folder / each).is_file() for each in _TOKENIZERS) else None


def fetch_configuration(name: str, revision: str | None) -> Path:
    """Returns a folder with a model's config.json; nothing else is fetched. Raises ModelError."""
    return cached_model(name, revision) or hub.fetch(_listing_of_model(name, revision), [_CONFIG])


def fetch_headers(name: str, revision: str | None) -> Mapping[str, TensorHeader]:
    """Reads the headers of a model's weights, which stay where they are. Raises ModelError."""
    folder = cached_model(name, revision)
    if folder is not None:
        return hub.local_headers(weights(folder))
    listing = _listing_of_model(name, revision)
    return hub.remote_headers(listing, _weights_of(listing))


def _cached_adapter(name: str, revision: str | None) -> Path | None:
    folder = hub.cached_folder(name, revision)
    whole = folder is not None and all((folder / each).is_file() for each in _FILES_OF_ADAPTER)
    return folder if whole else None


def _here(folder: Path) -> Pulled:
    files = tuple(sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file()))
    return Pulled(folder, folder.name, files, sum((folder / each).stat().st_size for each in files), asked=False)


def _is_adapter(files: Iterable[str]) -> bool:
    names = set(files)
    return names.issuperset(_FILES_OF_ADAPTER) and not names & {WEIGHTS, WEIGHTS_INDEX}


def _listing_of_model(name: str, revision: str | None) -> Listing:
    listing = hub.look_up(name, revision)
    _refuse_other_forms(listing)
    return listing


def _files_of_model(listing: Listing) -> list[str]:
    """Lists the files of a model, small ones first, so that they are beside weights that are here."""
    _refuse_other_forms(listing)
    small = [name for name in listing.files if any(_matches(name, each) for each in _SMALL_FILES)]
    kept = [name for name in small if not any(_matches(name, each) for each in _OF_OTHER_FORMS)]
    return [*kept, *([] if WEIGHTS in listing.files else [WEIGHTS_INDEX]), *_weights_of(listing)]


def _matches(name: str, pattern: str) -> bool:
    """True where a pattern matches; it holds for files in the repository's root, unless it names a folder."""
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _weights_of(listing: Listing) -> list[str]:
    """The files of weights; of a model in several, its index is fetched to name them. Raises ModelError."""
    if WEIGHTS in listing.files:
        return [WEIGHTS]
    try:
        names = shard_names(hub.fetch(listing, [WEIGHTS_INDEX]) / WEIGHTS_INDEX)
    except Refusal as error:
        raise ModelError(f"cannot fetch {listing.name}: its {error}") from None
    absent = [name for name in names if name not in listing.files]
    if absent:
        raise ModelError(
            f"cannot fetch {listing.name}: it has no {absent[0]}, which its {WEIGHTS_INDEX} names; choose another "
            "revision of it, or another model"
        )
    return names


def _refuse_other_forms(listing: Listing) -> None:
    """Raises ModelError for a repository that holds no model in the one form that is loaded."""
    files = listing.files
    if WEIGHTS in files or WEIGHTS_INDEX in files:
        if _CONFIG in files and ADAPTER_CONFIG not in files:
            return
        reason = (
            f"it holds {ADAPTER_CONFIG} beside a model's weights, and which of the two is meant nobody can tell; "
            "choose a repository with one of them"
            if ADAPTER_CONFIG in files
            else f"it holds no {_CONFIG}; choose the repository of a transformers model"
        )
    elif ADAPTER_CONFIG in files:
        reason = (
            f"it is an adapter and no model; load the model that it was trained on, with --adapter NAME={listing.name}"
        )
    elif _holds(files, "*.gguf"):
        reason = "it holds GGUF files alone, which are not loaded; choose the repository that they were made from"
    elif _holds(files, *_PICKLES):
        reason = (
            "it holds no safetensors weights, and its pickled ones are never fetched, since a pickle can run code; "
            "choose a revision with safetensors (many have one, such as --revision refs/pr/1), or save it anew with "
            "save_pretrained where you trust it, and name that folder"
        )
    else:
        reason = f"it holds neither {WEIGHTS} nor {WEIGHTS_INDEX}; choose a repository of a transformers language model"
    raise ModelError(f"cannot fetch {listing.name}: {reason}")


def _holds(files: Iterable[str], *patterns: str) -> bool:
    return any(fnmatch(name.rsplit("/", 1)[-1], pattern) for name in files for pattern in patterns)


def _fetched(listing: Listing, names: Sequence[str], announce: Announce) -> Pulled:
    missing = hub.lacking(listing, names)
    fetched_bytes = sum(listing.files[name].bytes for name in missing)
    if missing:
        announce(len(missing), fetched_bytes)
    folder = hub.fetch(listing, names)
    hub.remember(listing)
    whole_bytes = sum(listing.files[name].bytes for name in names)
    return Pulled(folder, listing.commit, tuple(names), whole_bytes, fetched_bytes)
