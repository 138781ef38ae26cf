"""The earlier job that `run` continues or exports: its answers come from the model that is there now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import update

from batchmill.jobs.errors import BatchmillError
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.digests import Digests
from batchmill.jobs.models.identity import of_adapter, of_model
from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import DEMO_FOLDER, ModelSpec
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import jobs
from batchmill.jobs.store.views.jobs import Job
from batchmill.producer.cli.local.earlier import choose
from tests.support.store import mill

HUB = ModelSpec("org/name", None, Quantization(Kind.NONE))
COMMIT, NEWER = "a" * 40, "b" * 40


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text(name)
    return ModelSpec(str(folder), None, Quantization(Kind.NONE))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the commit that the Hub's cache has of org/name; without a call it has none."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def set_commit(commit: str) -> None:
        refs = tmp_path / "hub" / "models--org--name" / "refs"
        refs.mkdir(parents=True, exist_ok=True)
        (refs / "main").write_text(commit)

    return set_commit


def ran(store: Store, spec: ModelSpec, identity: str, *, finished: bool = True, adapter: Adapter | None = None) -> str:
    """A job of this model, finished or interrupted after its first batch."""
    names = [adapter.name if adapter else None] * 8
    job_id = mill.load_named(store, *names, spec=spec)
    who = mill.session(store, spec=spec, identity=identity, adapters=[adapter] if adapter else [])
    (claimed,) = mill.claim(store, who)
    mill.save(store, who, [mill.answered(claimed)])
    if finished:
        mill.work_off(store, who)
    return job_id


def chosen(store: Store, spec: ModelSpec, *adapters: Adapter) -> Job | None:
    return choose(store.jobs.resumable("f"), spec, adapters, home=Path("home").absolute())


def present(spec: ModelSpec) -> str:
    return of_model(Path(spec.model), Digests()).identity


def test_the_newest_job_of_the_present_model_is_taken(store: Store, spec: ModelSpec) -> None:
    first, then = present(spec), Path(spec.model, "model.safetensors").read_text()
    old = ran(store, spec, first)
    Path(spec.model, "model.safetensors").write_text("another")
    assert chosen(store, spec) is None
    new = ran(store, spec, present(spec), finished=False)
    assert (job := chosen(store, spec)) is not None
    assert (job.id, job.closed) == (new, False)
    Path(spec.model, "model.safetensors").write_text(then)
    assert (job := chosen(store, spec)) is not None
    assert job.id == old


@pytest.mark.parametrize("finished", [True, False])
def test_what_changed_and_what_to_do_is_said(
    store: Store, spec: ModelSpec, finished: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = ran(store, spec, present(spec), finished=finished)
    Path(spec.model, "model.safetensors").write_text("another")
    Path(spec.model, "tokenizer.json").write_text("another")
    assert chosen(store, spec) is None
    begin = f"job {job_id} {'ran this file' if finished else 'was started'} with another model; changed since then:"
    remedy = f"results {job_id}` writes its answers" if finished else f"cancel {job_id}` closes it"
    assert capsys.readouterr().err == f"{begin} tokenizer and weights (`batchmill {remedy}); running the file again\n"


def test_nothing_is_looked_at_without_an_earlier_job(store: Store) -> None:
    assert chosen(store, ModelSpec("/no/such/folder")) is None


def test_echo_is_as_old_as_batchmill_and_demo_as_its_folder(store: Store) -> None:
    demo = ModelSpec("demo", None, Quantization(Kind.NONE))
    ran(store, mill.ECHO_SPEC, "batchmill=0.0.1")
    assert chosen(store, mill.ECHO_SPEC) is None
    ran(store, demo, of_model(DEMO_FOLDER, Digests()).identity)
    assert chosen(store, demo) is not None


@pytest.mark.parametrize("finished", [True, False])
def test_a_job_of_before_is_gone_on_with_and_a_finished_one_run_anew(
    store: Store, spec: ModelSpec, finished: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    ran(store, spec, present(spec), finished=finished)
    with store.database.write() as connection:
        connection.execute(update(jobs).values(identity=None))
    assert (chosen(store, spec) is None) == finished
    assert ("before batchmill recorded model files" in capsys.readouterr().err) == finished


class TestHub:
    def test_a_model_of_the_hub_is_its_commit(self, store: Store, cache: Callable[[str], None]) -> None:
        cache(COMMIT)
        ran(store, HUB, f"commit={COMMIT}")
        assert chosen(store, HUB) is not None
        cache(NEWER)
        assert chosen(store, HUB) is None

    def test_what_nobody_here_can_tell_is_refused_with_what_to_do(
        self, store: Store, cache: Callable[[str], None]
    ) -> None:
        job_id = ran(store, HUB, f"commit={COMMIT}")
        with pytest.raises(BatchmillError) as refused:
            chosen(store, HUB)
        for words in (f"batchmill results {job_id}", "batchmill models pull org/name", "--new"):
            assert words in str(refused.value)

    def test_an_interrupted_job_is_left_to_its_worker(self, store: Store, cache: Callable[[str], None]) -> None:
        ran(store, HUB, f"commit={COMMIT}", finished=False)
        assert chosen(store, HUB) is not None


class TestAdapters:
    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Adapter:
        (tmp_path / "a").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / "a" / name).write_text(name)
        folder = tmp_path / "a"
        return Adapter("a", str(folder), identity=of_adapter(folder, Digests()).identity)

    def test_one_that_the_job_used_is_compared(self, store: Store, spec: ModelSpec, adapter: Adapter) -> None:
        written = Adapter(adapter.name, adapter.path)
        ran(store, spec, present(spec), adapter=adapter)
        assert chosen(store, spec, written) is not None
        Path(adapter.path, "adapter_model.safetensors").write_text("another")
        assert chosen(store, spec, written) is None

    def test_one_of_the_hub_that_nobody_here_can_tell_is_refused(
        self, store: Store, spec: ModelSpec, cache: Callable[[str], None]
    ) -> None:
        written = Adapter("a", "org/name")
        ran(store, spec, present(spec), adapter=replace(written, identity=f"commit={COMMIT}"))
        with pytest.raises(BatchmillError, match=r"^org/name is no longer in this machine's cache"):
            chosen(store, spec, written)
        cache(COMMIT)
        assert chosen(store, spec, written) is not None

    def test_one_that_it_did_not_use_is_not(self, store: Store, spec: ModelSpec, adapter: Adapter) -> None:
        ran(store, spec, present(spec))
        Path(adapter.path, "adapter_model.safetensors").write_text("another")
        assert chosen(store, spec, Adapter(adapter.name, adapter.path)) is not None
