"""Names of models that are likely misspelt: those that are asked about, and those that never are."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from batchmill.jobs.advice import mill_lives, start_words
from batchmill.jobs.configuration.settings import Settings, load_settings
from batchmill.jobs.errors import PromptFileError
from batchmill.jobs.models.misspellings import meant_instead
from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.runtime.process.process import Lives, Process
from batchmill.jobs.store.store import Store
from batchmill.migrations.revisions import open_store
from batchmill.producer.cli.jobs import workers
from batchmill.producer.cli.model_name_check import warn_of_slip
from batchmill.producer.cli.submit import submit
from batchmill.producer.views.reasons import missing_lines
from batchmill.producer.views.status import JobStatus
from tests.support.store import mill


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("written", ["dmeo", "Demo", "demoo", "dem"])
def test_a_slip_of_demo_is_asked_about(written: str) -> None:
    assert meant_instead(ModelSpec(written)) == "demo"


@pytest.mark.parametrize("written", ["demo", "echo", "org/demo", "org/dmeo", "/models/dmeo", "gpt2", "llama"])
def test_what_is_known_or_like_nothing_or_names_its_owner_is_not(written: str) -> None:
    assert meant_instead(ModelSpec(written)) is None


def test_models_in_the_cache_are_known(cache: Path) -> None:
    for name in ("models--demmo", "models--meta-llama--Llama-3.1-8B"):
        (cache / name).mkdir(parents=True)
    assert meant_instead(ModelSpec("demmo")) is None
    assert meant_instead(ModelSpec("llama-3.1-8b")) == "meta-llama/Llama-3.1-8B"


def test_what_a_worker_has_held_is_known_and_what_a_job_asked_for_is_not(store: Store) -> None:
    mill.load(store, 1, spec=ModelSpec("dmeo"))
    mill.session(store, spec=ModelSpec("/models/tiny-chat"))
    mill.session(store, spec=ModelSpec("never-loaded"), ready=False)
    assert store.workers.models() == ["/models/tiny-chat"]
    assert meant_instead(ModelSpec("tinychat"), served=store.workers.models()) == "/models/tiny-chat"


def test_the_status_of_a_job_asks_while_nobody_serves_it(store: Store) -> None:
    job_id = mill.load(store, 1, spec=ModelSpec("dmeo"))
    lines = missing_lines(JobStatus.read(store, job_id))
    assert "did you mean demo?" in lines[0]
    assert lines[1].startswith(f"`batchmill cancel {job_id}`, and submit it again with -m demo")
    mill.session(store, spec=ModelSpec("dmeo"))
    assert missing_lines(JobStatus.read(store, job_id)) == []


def test_up_warns(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_slip(ModelSpec("dmeo"), store=store)
    warn_of_slip(ModelSpec("org/dmeo"), store=store)
    said = capsys.readouterr().err
    assert said == "warning: 'dmeo' is no folder here, no cached model and no org/name: did you mean demo?\n"


class TestSubmit:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "p.jsonl"
        path.write_text('{"prompt": "a", "model": "dmeo"}\n')
        return path

    def invoke(self, *words: str | Path) -> Result:
        return CliRunner().invoke(submit, [str(each) for each in words])

    @pytest.mark.parametrize("flags", [["-m", "dmeo"], []])
    def test_stores_the_job_and_says_so(self, file: Path, flags: list[str]) -> None:
        done = self.invoke(file, *flags)
        assert done.exit_code == 0, done.stderr
        assert done.stderr.count("did you mean demo?") == 1

    def test_asks_before_it_lists_the_lines_that_name_another_model(self, file: Path) -> None:
        done = self.invoke(file, "-m", "ehco")
        assert "did you mean echo?" in done.stderr
        assert isinstance(done.exception, PromptFileError)

    @pytest.mark.parametrize("flags", [["-m", "dmeo"], []])
    def test_refuses_to_wait_and_stores_nothing(self, file: Path, flags: list[str]) -> None:
        done = self.invoke(file, "--wait", *flags)
        assert "did you mean demo?" in f"{done.stderr}{done.exception}"
        assert done.exit_code != 0
        store = open_store(load_settings())
        assert store.jobs.jobs(most=1) == []
        store.close()


class TestStart:
    """The command that starts a worker works as it stands."""

    SPEC = ModelSpec("demo", None, Quantization(Kind.NF4))

    def words(self, settings: Settings) -> str:
        return " ".join(start_words(self.SPEC, settings, adapters=["a=/a"]))

    def test_it_is_up_where_no_mill_brings_a_redis(self, tmp_path: Path) -> None:
        assert self.words(Settings(home=tmp_path)) == "batchmill up -m demo -q nf4 --adapter a=/a"

    def test_workers_names_it_where_there_is_none(self) -> None:
        done = CliRunner().invoke(workers, [])
        assert done.stderr == "no live worker; `batchmill up -m MODEL` starts one\n"

    def test_workers_waits_for_that_of_a_mill_that_is_up(self) -> None:
        home = load_settings().home
        home.mkdir(parents=True, exist_ok=True)
        (home / "mill.pid").write_text(f"{Process.own()}\n")
        done = CliRunner().invoke(workers, [])
        assert done.stderr == "no live worker yet; the mill here is starting its worker\n"

    def test_it_is_worker_beside_a_mill_that_is_up(self, tmp_path: Path) -> None:
        (tmp_path / "mill.pid").write_text(f"{Process.own()}\n")
        assert self.words(Settings(home=tmp_path)) == "batchmill worker -m demo -q nf4 --adapter a=/a"

    @pytest.mark.parametrize("settings", [{"broker_url": "redis://mill/0"}, {"database_url": "postgresql://mill/x"}])
    def test_it_is_worker_where_up_would_be_refused(self, tmp_path: Path, settings: dict[str, str]) -> None:
        assert self.words(Settings(home=tmp_path, **settings)).startswith("batchmill worker ")  # type: ignore[arg-type]

    def test_a_mill_of_another_container_lives_while_its_redis_listens(self, tmp_path: Path) -> None:
        own = Process.own()
        assert own is not None
        text = str(own).rsplit(".", 1)[0] + ".1"
        elsewhere = Process.parse(text)
        assert elsewhere is not None
        assert elsewhere.lives() is Lives.UNKNOWN
        (tmp_path / "mill.pid").write_text(f"{text}\n")
        assert not mill_lives(tmp_path)
        (tmp_path / "redis.sock").touch()
        assert mill_lives(tmp_path)

    def test_a_mill_that_was_killed_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "mill.pid").write_text(f"{Process.own()}\n".replace("1.", "1.9", 1))
        (tmp_path / "redis.sock").touch()
        assert not mill_lives(tmp_path)
