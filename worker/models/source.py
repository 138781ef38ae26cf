"""Finds a model's files: in the bundled folder, a folder of this machine, or the Hub's cache, filled where it lacks.

It knows names of files and no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from batchmill.jobs.errors import ModelError
from batchmill.jobs.models.spec import DEMO, DEMO_FOLDER, ModelSpec
from batchmill.jobs.runtime.logs import get_logger
from batchmill.worker.models.hub import repository
from batchmill.worker.models.hub.client import TensorHeader, local_headers
from batchmill.worker.models.vetting import Refusal, weights

log = get_logger(__name__)


def find(spec: ModelSpec) -> tuple[Path, str | None]:
    """Finds the folder of this model, and the commit that its revision resolved to: None where it has none.

    A model of the Hub is taken from the cache where all of it is there, with no request to anyone; else the missing
    files are fetched. Raises ModelError.
    """
    if _is_local(spec):
        return _folder(spec), None
    pulled = repository.find_model(spec.model, spec.revision, announce=_announcer(str(spec)))
    return pulled.folder, pulled.commit


def find_adapter(path_or_id: str, revision: str | None) -> tuple[Path, str | None]:
    """Finds the folder of an adapter, and its commit: None for a folder of this machine.

    Of an adapter of the Hub, adapter_config.json and adapter_model.safetensors alone are fetched. Raises ModelError.
    """
    folder = Path(path_or_id).expanduser()
    if not folder.is_dir():
        if path_or_id.startswith(("/", ".", "~")):
            raise ModelError(f"there is no adapter's folder {path_or_id} on this machine; copy the adapter there")
        pulled = repository.find_adapter(path_or_id, revision, announce=_announcer(path_or_id))
        return pulled.folder, pulled.commit
    if revision is not None:
        raise ModelError(f"a revision goes with a Hugging Face id, and the adapter {path_or_id} is a folder")
    return folder.resolve(), None


def configuration(spec: ModelSpec) -> Path:
    """Finds a folder with this model's config.json at least; no weights are fetched for it. Raises ModelError."""
    return _folder(spec) if _is_local(spec) else repository.fetch_configuration(spec.model, spec.revision)


def headers(spec: ModelSpec) -> Mapping[str, TensorHeader]:
    """Reads the headers of this model's weights: every tensor by name. Raises ModelError."""
    if not _is_local(spec):
        return repository.fetch_headers(spec.model, spec.revision)
    try:
        return local_headers(weights(_folder(spec)))
    except Refusal as error:
        raise ModelError(f"cannot read {spec}: {error}") from None


def _announcer(name: str) -> Callable[[int, int], None]:
    def announce(files: int, bytes_: int) -> None:
        log.info("fetching", name=name, files=files, bytes=bytes_)

    return announce


def _is_local(spec: ModelSpec) -> bool:
    return spec.model == DEMO or spec.folder is not None


def _folder(spec: ModelSpec) -> Path:
    """Finds the folder that this spec names, or the bundled one."""
    folder = DEMO_FOLDER if spec.model == DEMO else spec.folder
    if folder is None or not folder.is_dir():
        remedy = "make it with `make demo-model`" if spec.model == DEMO else "copy the model there"
        raise ModelError(f"cannot load {spec}: there is no folder {folder} on this machine; {remedy}")
    return folder
