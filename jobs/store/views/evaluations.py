"""Evaluations: the cost of quantization, measured once and kept; later jobs of the same ModelSpec show it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, select

from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.store.database.conflicts import retried
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.tables import evaluations


@dataclass(frozen=True, slots=True)
class DataFile:
    """The text that was measured on: a file's name without its folders, and the hash of its bytes."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One ModelSpec as it was measured once."""

    spec: ModelSpec
    #: The ModelSpec that it was compared with, None where that could not be measured.
    baseline: ModelSpec | None
    data: DataFile
    device_name: str
    #: The figures and the method.
    measured: Mapping[str, Any]
    versions: Mapping[str, str]
    #: Seconds since 1970, UTC.
    created_at: float

    def to_json(self) -> dict[str, Any]:
        """Everything but the spec."""
        return {
            "baseline": None if self.baseline is None else self.baseline.quantization.canonical,
            "data": {"name": self.data.name, "sha256": self.data.sha256},
            "device": self.device_name,
            "measured": dict(self.measured),
            "versions": dict(self.versions),
            "created_at": self.created_at,
        }


class Evaluations:
    """The rows of `batchmill evaluate`; none is ever changed."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @retried
    def add(
        self,
        spec: ModelSpec,
        *,
        identity: str,
        baseline: ModelSpec | None,
        data: DataFile,
        device_name: str,
        measured: Mapping[str, Any],
        versions: Mapping[str, str],
    ) -> None:
        """Keeps what was measured of one ModelSpec, of a model of this identity; `measured` is ready for json."""
        row = insert(evaluations).values(
            spec=spec.canonical,
            identity=identity,
            baseline=None if baseline is None else baseline.canonical,
            data_name=data.name,
            data_sha256=data.sha256,
            device_name=device_name,
            measured=json.dumps(dict(measured), allow_nan=False),
            versions=json.dumps(dict(versions)),
            created_at=self._database.now,
        )
        with self._database.write() as connection:
            connection.execute(row)

    def latest(self, spec: ModelSpec, *, identity: str | None = None) -> EvaluationRow | None:
        """The last one of exactly this ModelSpec, and of a model of this identity if one is given; None without."""
        newest = (
            select(evaluations)
            .where(evaluations.c.spec == spec.canonical)
            .order_by(evaluations.c.created_at.desc(), evaluations.c.id.desc())
            .limit(1)
        )
        if identity is not None:
            newest = newest.where(evaluations.c.identity == identity)
        with self._database.read() as connection:
            row = connection.execute(newest).one_or_none()
        if row is None:
            return None
        return EvaluationRow(
            spec,
            None if row.baseline is None else ModelSpec.from_canonical(row.baseline),
            DataFile(row.data_name, row.data_sha256),
            row.device_name,
            json.loads(row.measured),
            json.loads(row.versions),
            row.created_at,
        )
