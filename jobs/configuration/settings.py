"""Every setting of batchmill: the only reader of the environment and of batchmill.toml.

Precedence, highest first: a flag of the command, `BATCHMILL_<NAME>` in the environment, `batchmill.toml` in the
current folder, and the embedded defaults under the user's data folder.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from batchmill.jobs.configuration.flags import FLAG_OF_SETTING
from batchmill.jobs.configuration.settings_file import TOML_FILE, read_settings_file
from batchmill.jobs.errors import SettingsError, UsageError
from batchmill.jobs.models.quantization import Quantization
from batchmill.jobs.requests.request import DEFAULT_LINE_BYTES, MAX_LINE_BYTES
from batchmill.jobs.runtime.command_errors import say
from batchmill.jobs.runtime.home import socket_path

PREFIX = "BATCHMILL_"
#: Settings that name folders and servers, or the authority that a server is trusted by.
_PLACES = ("home", "broker_url", "broker_ca_file", "broker_insecure", "database_url")
_WORKER_BUSY_SECONDS = 2.0
#: At most a year: a longer time overflows the clocks that wait for it.
Seconds = Annotated[float, Field(gt=0, le=366 * 86_400)]
#: The files in home besides the store, its folders and the files of trials.
_OWN_FILES = ("mill.lock", "mill.pid", "redis.log", "redis.pid", "redis.sock", "store.lock", "worker.log", "worker.pid")


class Settings(BaseSettings):
    """Timers are in seconds. A bad value is refused by name, and so is an unknown name."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True)

    home: Path = Field(
        default_factory=lambda: Path(platformdirs.user_data_dir("batchmill")),
        description="folder of the embedded store, Redis, locks and logs",
    )
    broker_url: str = Field(default="", description="Redis; empty: the embedded one under home")
    broker_ca_file: Path | None = Field(
        default=None, description="of rediss://: who signs the certificate of Redis; empty: the system's"
    )
    broker_insecure: bool = Field(default=False, description="of rediss://: take any certificate")
    database_url: str = Field(default="", description="SQLite or PostgreSQL; empty: SQLite under home")

    heartbeat_seconds: Seconds = Field(default=5.0, description="interval of a worker's heartbeats")
    lease_seconds: Seconds = Field(
        default=60.0, description="a batch's lease lasts so long without renewal; the same everywhere"
    )
    save_seconds: Seconds = Field(default=1.0, description="longest time between two commits of a worker")
    reconcile_seconds: Seconds = Field(default=15.0, description="interval of the reconciler")
    loading_lease_seconds: Seconds = Field(
        default=60.0, description="a submit's lease lasts so long; the same everywhere"
    )
    drain_seconds: Seconds = Field(default=15.0, description="time for a stopping worker to hand work back")
    stall_seconds: Seconds = Field(default=600.0, description="time without a token before a worker is ended")
    load_stall_seconds: Seconds = Field(
        default=3_600.0, description="time for loading a model before a worker is ended"
    )
    busy_seconds: Seconds = Field(default=30.0, description="time to wait for SQLite's lock or a PostgreSQL connection")

    quantization: str = Field(
        default="nf4", description="default of commands without -q, with its options if it has any"
    )
    engine: Literal["auto", "continuous", "generate"] = Field(
        default="auto", description="what serves the model; auto: continuous wherever the model allows it"
    )
    engine_rows: int | None = Field(
        default=None, ge=1, description="most requests a device works on at once; empty: the engine's own"
    )
    context_tokens: int | None = Field(
        default=None, ge=1, description="most tokens of a prompt and its answer together; empty: the model's own"
    )
    gpu_memory_fraction: float = Field(default=0.9, gt=0, le=1, description="part of a GPU for weights and cache")
    cache_bytes: int | None = Field(default=None, gt=0, description="keys and values, at most; empty: by free memory")
    dequantize: Literal["auto", "never", "always"] = Field(
        default="auto", description="full-precision copies of 4-bit weights; auto: where memory is left for them"
    )
    deterministic: bool = Field(default=False, description="an answer does not depend on what else runs")
    max_line_bytes: int = Field(
        default=DEFAULT_LINE_BYTES, ge=1, le=MAX_LINE_BYTES, description="longest line of a prompt file"
    )
    spool_bytes: int = Field(default=256 * 1024**2, gt=0, description="outputs that wait while the store is away")
    echo_step_seconds: float = Field(default=0.0, ge=0, description="a step of the echo engine, for trials")
    chaos: bool = Field(default=False, description="the echo engine obeys magic prompts such as !kill9, for trials")
    failpoint: str = Field(default="", description="name=kill9@3: dies at the third passing of a point, for trials")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least level that is logged"
    )
    log_format: Literal["console", "json"] = Field(
        default="console", description="lines for people, or a JSON object per line"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        try:
            return home.expanduser().absolute()
        except RuntimeError as error:  # ~somebody, of whom this machine knows nothing
            raise ValueError(str(error)) from None

    @field_validator("broker_url")
    @classmethod
    def _redis(cls, url: str) -> str:
        if url and not url.startswith(("redis://", "rediss://", "redis+socket://")):
            raise ValueError("must begin with redis://, rediss:// or redis+socket://")
        return url

    @field_validator("quantization")
    @classmethod
    def _quantization(cls, written: str) -> str:
        try:
            return Quantization.parse(written).canonical
        except UsageError as error:
            raise ValueError(str(error)) from None

    @field_validator("database_url")
    @classmethod
    def _database(cls, url: str) -> str:
        try:
            known = not url or make_url(url).get_backend_name() in ("sqlite", "postgresql")
        except ArgumentError:
            known = False
        if not known:
            raise ValueError("must begin with sqlite:/// or postgresql://")
        return url

    @model_validator(mode="after")
    def _ratios(self) -> Settings:
        if self.lease_seconds < 4 * self.save_seconds:
            raise ValueError("lease_seconds must be at least 4 times save_seconds, which renews the lease")
        return self

    @property
    def embedded_broker(self) -> bool:
        return not self.broker_url

    @property
    def embedded_store(self) -> bool:
        return not self.database_url

    @property
    def redis_socket(self) -> Path:
        """The socket of the embedded Redis. Its path has at most 107 bytes, so a long home gets a short stand-in."""
        return socket_path(self.home)

    @property
    def broker(self) -> str:
        """The URL of Redis, embedded or not."""
        return self.broker_url or f"redis+socket://{self.redis_socket}"

    @property
    def worker_busy_seconds(self) -> float:
        """The busy timeout of workers. It is shorter, since outputs have a spool, and draining has a time limit."""
        return min(self.busy_seconds, _WORKER_BUSY_SECONDS)

    @property
    def database_file(self) -> Path:
        return self.home / "batchmill.db"

    @property
    def database(self) -> str:
        """The URL of the store, embedded or not."""
        return self.database_url or URL.create("sqlite", database=str(self.database_file)).render_as_string()

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that batchmill needs: no command writes its user's answers over them."""
        own = [Path(TOML_FILE), *(self.home / name for name in _OWN_FILES)]
        own += [*self.home.glob("worker.log.*"), *self.home.glob("logs/*.log*")]
        if self.broker_ca_file is not None:
            own.append(self.broker_ca_file)
        url = make_url(self.database)
        if url.get_backend_name() == "sqlite" and url.database:
            own += [Path(url.database + ending) for ending in ("", "-journal", "-wal", "-shm", "-line")]
        return tuple(own)


def load_settings(**flags: Any) -> Settings:
    """The settings in force; `flags` that are None were not given.

    Says on stderr which file names servers and folders. Raises SettingsError, which names each bad or unknown setting.
    """
    _refuse_unknown(os.environ)
    given = {name: value for name, value in flags.items() if value is not None}
    path = Path(TOML_FILE)
    in_environment = {name.upper() for name in os.environ}
    written = {
        name: value
        for name, value in read_settings_file(path).items()
        if name not in given and f"{PREFIX}{name.upper()}" not in in_environment
    }
    try:
        settings = Settings(**written, **given)
    except ValidationError as error:
        raise SettingsError("; ".join(_spell(each, given) for each in error.errors())) from None
    if places := [name for name in _PLACES if name in written]:
        say(f"{path.resolve()} is read, which says {' and '.join(places)}")
    return settings


def environment_of(settings: Settings) -> dict[str, str]:
    """These settings as environment variables, for a process that this one starts."""
    values = settings.model_dump(exclude_none=True)
    return {f"{PREFIX}{name.upper()}": str(value) for name, value in values.items()}


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    for name in environ:
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise SettingsError(f"unknown setting {name}" + (f"; did you mean {near[0]}?" if near else ""))


def _spell(error: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """One error of pydantic's, under the name by which the value was written."""
    name = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    if not name:
        return message
    if error["type"] == "extra_forbidden":
        return f"unknown setting {name} in {TOML_FILE}"
    if name in given:
        return f"{FLAG_OF_SETTING.get(name, name)}: {message}"
    where = f"{PREFIX}{name.upper()}"
    return f"{where if where in os.environ else name}: {message}"
