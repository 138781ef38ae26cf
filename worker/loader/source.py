"""Where a model's files are: the bundled folder, a folder of this machine, or the Hub's cache, filled where it lacks.

It knows names of files and no tensors.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import resolve_revision, snapshot_download

from jobs.errors import ModelError
from jobs.spec import DEMO, ModelSpec
from worker.vetting import WEIGHTS, WEIGHTS_INDEX, shard_names

DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "model"
#: What is fetched of a model beside its weights: configuration, vocabularies and chat templates.
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")


def find(spec: ModelSpec) -> tuple[Path, str | None]:
    """The folder of this model, and the commit that its revision resolved to: None where it has none.

    What a Hub's model lacks in the cache is fetched. Raises ModelError for a folder that is not here, and whatever
    huggingface_hub raises.
    """
    if spec.model == DEMO or spec.folder is not None:
        return _folder(spec), None
    return _fetched(spec)


def _folder(spec: ModelSpec) -> Path:
    """The folder that this spec names, or the bundled one."""
    folder = DEMO_FOLDER if spec.model == DEMO else spec.folder
    if folder is None or not folder.is_dir():
        remedy = "make it with `make demo-model`" if spec.model == DEMO else "copy the model there"
        raise ModelError(f"cannot load {spec}: there is no folder {folder} on this machine; {remedy}")
    return folder


def _fetched(spec: ModelSpec) -> tuple[Path, str]:
    """The folder of the Hub's cache that holds this model, and its commit; what is missing there is fetched.

    Of a repository only safetensors, configuration and vocabularies come to this machine: no pickles, no code, and
    of weights that it holds in several forms just the one that is loaded.
    """
    revision = resolve_revision(spec.model, revision=spec.revision)

    def fetch(*names: str) -> Path:
        return Path(
            snapshot_download(
                spec.model, revision=revision.resolved, allow_patterns=list(names), ignore_patterns=["*/*"]
            )
        )

    folder = fetch(*_SMALL_FILES)
    index = folder / WEIGHTS_INDEX
    fetch(*(shard_names(index) if index.is_file() else [WEIGHTS]))
    return folder, revision.resolved
