"""Models of the Hugging Face Hub: what is fetched, what is not, and what is said where it cannot be.

The client is the real one, in processes of their own, against a server on this machine.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models.tiny import save_tiny_model
from tests.support.processes.holding import file_lock
from tests.support.servers.hub_machine import MODEL, ROOT, Machine, found
from tests.support.servers.hub_server import TOKEN, Hub, Repository, commit_of, files_of, serving

#: Files of the repositories beside the model, none of which is to be fetched.
CLUTTER = {
    "README.md": b"# A model",
    ".gitattributes": b"*.bin filter=lfs",
    "own.py": b"raise SystemExit",
    "pytorch_model.bin": b"a pickle",
    "pytorch_model.bin.index.json": b"{}",
    "training_args.bin": b"a pickle",
    "model.Q4_K_M.gguf": b"GGUF",
    "consolidated.safetensors": b"the same in another form",
    "onnx/model.onnx": b"the same in another form",
    "onnx/config.json": b"{}",
    "original/params.json": b"{}",
    "original/model.safetensors": b"the same in another form",
    "custom_generate/generate.py": b"raise SystemExit",
}
NEEDED = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files_of(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with serving(Hub({MODEL: Repository.of(files | CLUTTER)})) as served:
        yield served


@pytest.fixture
def machine(tmp_path: Path, hub: Hub) -> Machine:
    return Machine(tmp_path, hub.url)


def test_only_what_is_needed_is_fetched(machine: Machine, hub: Hub) -> None:
    pulled = machine.pull()
    assert sorted(hub.fetched()) == sorted([*NEEDED, "model.safetensors"])
    assert sorted(pulled["files"]) == sorted(hub.fetched())
    assert (pulled["model"], pulled["revision"], pulled["commit"]) == (MODEL, None, commit_of(1))
    folder = Path(pulled["folder"])
    assert folder == machine.cache / "models--some-org--some-model" / "snapshots" / commit_of(1)
    assert sorted(each.name for each in folder.iterdir()) == sorted(pulled["files"])
    assert pulled["bytes"] == pulled["fetched_bytes"] == sum(each.stat().st_size for each in folder.iterdir())


def test_a_second_pull_fetches_nothing(machine: Machine, hub: Hub) -> None:
    first = machine.pull()
    hub.asked.clear()
    done = machine.models("pull", MODEL)
    assert done.stdout.strip() == first["folder"]
    assert "everything is here already" in done.stderr
    assert [(each.method, each.path) for each in hub.asked] == [("GET", f"/api/models/{MODEL}")]


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells who holds a lock")
def test_who_else_fetches_a_file_is_named(machine: Machine) -> None:
    pulled = machine.pull()
    link = Path(pulled["folder"]) / "config.json"
    blob = link.resolve()
    link.unlink()
    blob.unlink()
    lock = machine.cache / ".locks" / blob.parent.parent.name / f"{blob.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "batchmill.worker", "models", "pull", MODEL]
    with file_lock(lock) as pid:
        pulling = subprocess.Popen(words, env=machine.environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert pulling.stderr is not None
        said = next((line for line in pulling.stderr if "waiting since" in line), "")
        assert said.endswith(f" for the file config.json of {MODEL}, which is locked by pid {pid}\n")
    pulling.communicate()
    assert pulling.returncode == 0
    assert link.exists()


def test_of_an_index_the_named_shards_come_and_nothing_else(
    machine: Machine, hub: Hub, files: dict[str, bytes]
) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = json.dumps({"weight_map": {"a": names[0], "b": names[1]}}).encode()
    weights = files["model.safetensors"]
    rest = {name: content for name, content in files.items() if name != "model.safetensors"}
    shards = {names[0]: weights, names[1]: weights + b" ", "model-00001-of-00003.safetensors": b"of another form"}
    hub.repositories[MODEL] = Repository.of(rest | shards | CLUTTER | {"model.safetensors.index.json": index})
    machine.pull()
    assert sorted(hub.fetched()) == sorted([*NEEDED, "model.safetensors.index.json", *names])
    hub.repositories[MODEL].commits[commit_of(2)] = {
        name: content for name, content in hub.repositories[MODEL].commits[commit_of(1)].items() if name != names[1]
    }
    assert f"it has no {names[1]}, which its model.safetensors.index.json names" in machine.refusal(
        MODEL, "--revision", commit_of(2)
    )


@pytest.mark.parametrize("kind", ["branch", "tag", "commit"])
def test_a_revision_is_found_offline_as_it_was_written(
    machine: Machine, hub: Hub, files: dict[str, bytes], kind: str
) -> None:
    hub.repositories[MODEL].commits[commit_of(2)] = files
    hub.repositories[MODEL].revisions |= {"feature/x": commit_of(2), "v1.0": commit_of(2)}
    written = {"branch": "feature/x", "tag": "v1.0", "commit": commit_of(2)}[kind]
    pulled = machine.pull("--revision", written)
    assert (pulled["revision"], pulled["commit"]) == (written, commit_of(2))
    hub.asked.clear()
    assert found(machine, revision=written, HF_HUB_OFFLINE="1") == pulled["folder"]
    said = found(machine, revision="v9", HF_HUB_OFFLINE="1")
    assert f"run `HF_HUB_OFFLINE=0 batchmill models pull {MODEL} --revision v9`" in said
    assert hub.asked == [], "HF_HUB_OFFLINE lets no request out"


def test_a_pull_brings_what_changed_and_offline_is_told_apart(
    machine: Machine, hub: Hub, files: dict[str, bytes]
) -> None:
    machine.pull()
    repository = hub.repositories[MODEL]
    repository.commits[commit_of(2)] = files | {"chat_template.jinja": b"{{ messages }}"}
    repository.revisions["main"] = commit_of(2)
    done = machine.models("pull", MODEL, HF_HUB_OFFLINE="1")
    assert done.returncode == 0
    assert "the Hub could not be asked for a newer one" in done.stderr
    assert commit_of(1) in done.stdout
    assert found(machine).endswith(commit_of(1)), "a worker keeps its model until a pull brings a newer one"
    hub.asked.clear()
    assert machine.pull()["commit"] == commit_of(2)
    assert hub.fetched() == ["chat_template.jinja"], "the cache knows the other contents already"
    assert found(machine).endswith(commit_of(2))


def test_a_pull_that_breaks_off_leaves_what_was_there(machine: Machine, hub: Hub, files: dict[str, bytes]) -> None:
    machine.pull()
    repository = hub.repositories[MODEL]
    repository.commits[commit_of(2)] = files | {"model.safetensors": files["model.safetensors"][::-1]}
    repository.revisions["main"] = commit_of(2)
    hub.cut_bytes = [0] * 6
    assert "cannot be reached" in machine.refusal()
    assert found(machine, HF_HUB_OFFLINE="1").endswith(commit_of(1))
    hub.asked.clear()
    assert machine.pull()["commit"] == commit_of(2)
    assert hub.fetched() == ["model.safetensors"], "what was whole before is not fetched again"


def test_a_connection_that_breaks_is_taken_up_where_it_broke(machine: Machine, hub: Hub) -> None:
    piece = 10 * 1024**2  # which the client writes at a time
    whole = os.urandom(3 * piece)
    hub.repositories[MODEL].commits[commit_of(1)]["model.safetensors"] = whole
    hub.cut_bytes = [piece + 1000, piece + 1000]
    pulled = machine.pull()
    ranges = [each.range for each in hub.asked if each.path.startswith("/cdn/")]
    assert ranges == [None, f"bytes={piece}-", f"bytes={2 * piece}-"]
    assert (Path(pulled["folder"]) / "model.safetensors").read_bytes() == whole


def test_a_file_that_was_cut_off_in_the_cache_is_replaced(machine: Machine, hub: Hub) -> None:
    weights = Path(machine.pull()["folder"]) / "model.safetensors"
    os.truncate(weights.resolve(), 1000)
    hub.asked.clear()
    machine.pull()
    assert hub.fetched() == ["model.safetensors"]
    assert weights.read_bytes() == hub.repositories[MODEL].commits[commit_of(1)]["model.safetensors"]


def test_downloads_of_dead_processes_are_removed(machine: Machine) -> None:
    blobs = machine.cache / "models--some-org--some-model" / "blobs"
    blobs.mkdir(parents=True)
    old, new = blobs / "a.12345678.incomplete", blobs / "b.12345678.incomplete"
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    machine.pull()
    assert (old.exists(), new.exists()) == (False, True)


def test_a_gated_model_without_a_token_says_what_to_do(machine: Machine, hub: Hub) -> None:
    hub.repositories[MODEL].gated = True
    said = machine.refusal()
    assert "it is gated; accept its terms at" in said
    assert f"{hub.url}/{MODEL}" in said
    assert "`export HF_TOKEN=...`" in said
    assert f"batchmill models pull {MODEL}" in said
    assert "it is gated" in found(machine)


def test_a_gated_model_comes_with_a_token_that_is_nowhere_told(machine: Machine, hub: Hub) -> None:
    hub.repositories[MODEL].gated = True
    done = machine.models("pull", MODEL, HF_TOKEN=TOKEN, HF_DEBUG="1")
    assert done.returncode == 0
    assert TOKEN not in done.stdout + done.stderr
    assert all(each.with_token == (not each.path.startswith("/cdn/")) for each in hub.asked)
    assert found(machine).endswith(commit_of(1)), "from the cache it starts without a token"


def test_a_saved_login_is_used(machine: Machine, hub: Hub) -> None:
    hub.repositories[MODEL].private = True
    (machine.home / "hf").mkdir()
    (machine.home / "hf" / "token").write_text(TOKEN)
    assert machine.pull()["commit"] == commit_of(1)


def test_a_token_without_access_says_so(machine: Machine, hub: Hub) -> None:
    hub.repositories[MODEL].gated = True
    hub.granted.clear()
    assert "the token of this machine gives no access to it" in machine.refusal(HF_TOKEN=TOKEN)


def test_a_token_that_nobody_knows_says_so(machine: Machine, hub: Hub) -> None:
    hub.known.clear()
    assert "the Hub does not know the token of this machine (HF_TOKEN, or the saved login)" in machine.refusal(
        HF_TOKEN=TOKEN
    )


@pytest.mark.parametrize("token", [f"{TOKEN}é", f"{TOKEN}\0"])
def test_a_token_that_cannot_be_sent_says_so(machine: Machine, token: str) -> None:
    (machine.home / "hf").mkdir()
    (machine.home / "hf" / "token").write_text(token)
    assert "holds characters that no token has" in machine.refusal()


@pytest.mark.parametrize("private", [False, True])
def test_an_unknown_or_private_repository_says_so(machine: Machine, hub: Hub, private: bool) -> None:
    hub.repositories = {MODEL: Repository.of({}, private=True)} if private else {}
    said = machine.refusal()
    assert "has no such repository, or it is a private one" in said
    assert "export HF_TOKEN=..." in said
    hub.granted.clear()
    assert "log in as one who may read it" in machine.refusal(HF_TOKEN=TOKEN)


def test_an_unknown_revision_says_so(machine: Machine) -> None:
    assert f"cannot fetch {MODEL}@v9: it has no such revision" in machine.refusal(MODEL, "--revision", "v9")


def test_a_hub_that_is_away_is_no_matter_for_a_cached_model(machine: Machine, hub: Hub) -> None:
    pulled = machine.pull()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        away = f"http://someone:secret@127.0.0.1:{closed.getsockname()[1]}"
        assert found(machine, HF_ENDPOINT=away) == pulled["folder"]
        assert machine.pull(HF_ENDPOINT=away)["asked"] is False
        said = machine.refusal("some-org/other", HF_ENDPOINT=away)
    assert "the Hugging Face Hub cannot be reached at http://127.0.0.1" in said
    assert "secret" not in said
    assert "run `batchmill models pull some-org/other` when there is a network, or on a machine that has one" in said


def test_a_hub_that_hangs_is_given_up(machine: Machine, hub: Hub) -> None:
    pulled = machine.pull()
    hub.hangs = True
    hub.asked.clear()
    assert found(machine) == pulled["folder"]
    assert hub.asked == [], "a model that is here whole asks nobody"
    began = time.monotonic()
    assert "cannot be reached" in machine.refusal("some-org/other", HF_HUB_ETAG_TIMEOUT="1")
    assert time.monotonic() - began < 15


def test_a_hub_that_fails_says_so(machine: Machine, hub: Hub) -> None:
    machine.pull()
    hub.status = 503
    assert machine.pull()["asked"] is False
    assert "the Hub answered with an error (503); wait" in machine.refusal("some-org/other")
    hub.status = 429
    assert "takes no more requests for now (429); log in with HF_TOKEN" in machine.refusal()


def test_an_address_that_is_no_hub_says_so(machine: Machine, hub: Hub) -> None:
    hub.repositories[MODEL] = Repository.of({"x": b""})
    hub.status = 200
    assert "is not a Hugging Face Hub; check HF_ENDPOINT, the proxy settings" in machine.refusal()


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ({"pytorch_model.bin": b"x" * 1000}, "its pickled ones are never fetched, since a pickle can run code"),
        ({"model.Q4_0.gguf": b"x" * 1000}, "it holds GGUF files alone"),
        ({"consolidated.safetensors": b"x" * 1000}, "it holds neither model.safetensors nor"),
        ({"original/model.safetensors": b"x" * 1000}, "it holds neither model.safetensors nor"),
        ({"model.safetensors": b"", "adapter_config.json": b"{}"}, "which of the two is meant nobody can tell"),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_it_is_fetched(
    machine: Machine, hub: Hub, held: dict[str, bytes], reason: str
) -> None:
    hub.repositories[MODEL] = Repository.of({"config.json": b"{}"} | held)
    assert reason in machine.refusal()
    assert hub.fetched() == []


def test_a_repository_without_a_configuration_is_refused(machine: Machine, hub: Hub) -> None:
    hub.repositories[MODEL] = Repository.of({"model.safetensors": b"x"})
    assert "it holds no config.json" in machine.refusal()
    assert hub.fetched() == []


def test_too_small_a_disk_is_told_before_anything_is_fetched(
    hub: Hub, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import shutil, sys\n"
        "shutil.disk_usage = lambda _: type('Usage', (), {'free': 1000})\n"
        "from batchmill.worker.cli.models import main\n"
        f"sys.argv = ['models', 'pull', {MODEL!r}]\n"
        "main()\n"
    )
    done = machine.run("-c", code)
    assert done.returncode == 1
    assert "are to come, and" in done.stderr
    assert "free some, or set HF_HOME to a folder on a larger disk" in done.stderr
    assert hub.fetched() == []


def test_a_cache_that_cannot_be_written_says_so(machine: Machine) -> None:
    (machine.home / "hf").write_text("a file is in the way")
    assert f"in the cache {machine.cache}" in machine.refusal()


def test_a_worker_fetches_what_is_not_here(machine: Machine, hub: Hub) -> None:
    assert found(machine).endswith(commit_of(1))
    assert sorted(hub.fetched()) == sorted([*NEEDED, "model.safetensors"])


def test_a_cache_that_lacks_the_tokenizer_is_filled(machine: Machine, hub: Hub) -> None:
    folder = Path(machine.pull()["folder"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).resolve().unlink()
        (folder / name).unlink()
    hub.asked.clear()
    assert found(machine).endswith(commit_of(1))
    assert sorted(hub.fetched()) == ["tokenizer.json", "tokenizer_config.json"]


ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * 1000}


def test_an_adapter_is_fetched_alone(machine: Machine, hub: Hub) -> None:
    hub.repositories[MODEL] = Repository.of(ADAPTER | CLUTTER | {"tokenizer.json": b"{}", "optimizer.pt": b"x"})
    assert sorted(machine.pull()["files"]) == sorted(ADAPTER)
    assert sorted(hub.fetched()) == sorted(ADAPTER)
    hub.asked.clear()
    assert found(machine, revision="main", what="adapter", HF_HUB_OFFLINE="1").endswith(commit_of(1))
    assert hub.asked == []
    assert f"--adapter NAME={MODEL}" in found(machine)


def test_a_repository_without_safetensors_is_no_adapter(machine: Machine, hub: Hub) -> None:
    hub.repositories[MODEL] = Repository.of({"adapter_config.json": b"{}", "adapter_model.bin": b"a pickle"})
    assert "it has no adapter_model.safetensors; save it with peft" in found(machine, what="adapter")
    assert hub.fetched() == []


def test_headers_are_read_without_the_weights(machine: Machine, hub: Hub, files: dict[str, bytes]) -> None:
    code = (
        "import json\n"
        "from batchmill.worker.models.hub.repository import fetch_configuration, fetch_headers\n"
        f"headers = fetch_headers({MODEL!r}, None)\n"
        "found = {name: [each.dtype, each.shape, each.bytes] for name, each in headers.items()}\n"
        f"print(json.dumps([sorted(file.name for file in fetch_configuration({MODEL!r}, None).iterdir()), found]))\n"
    )
    done = machine.run("-c", code)
    names, tensors = json.loads(done.stdout)
    assert names == ["config.json"]
    assert tensors["lm_head.weight"] == ["F32", [260, 64], 260 * 64 * 4]
    assert sum(each[2] for each in tensors.values()) < len(files["model.safetensors"])
    ranges = [each.range for each in hub.asked if each.path.startswith("/cdn/")]
    assert ranges == ["bytes=0-100000"]
    machine.pull()
    hub.asked.clear()
    assert json.loads(machine.run("-c", code, HF_HUB_OFFLINE="1").stdout)[1] == tensors
    assert hub.asked == []


def test_doctor_says_whether_workers_can_start_offline(machine: Machine) -> None:
    code = (
        "from batchmill.jobs.configuration.settings import load_settings\n"
        "from batchmill.producer.cli import doctor\n"
        "doctor._cuda = lambda: doctor.Check('cuda', True, 'not looked for')\n"  # which takes torch's seconds
        f"found = next(each for each in doctor.examine(load_settings(), model={MODEL!r}) if each.name == 'model')\n"
        "print(found.ok, found.required, found.found, '->', found.fix)\n"
    )
    said = f"False True {MODEL} is not complete in the cache, and HF_HUB_OFFLINE is set"
    fix = f"HF_HUB_OFFLINE=0 batchmill models pull {MODEL}"
    assert machine.run("-c", code, HF_HUB_OFFLINE="1").stdout.strip() == f"{said} -> {fix}"
    machine.pull()
    done = machine.run("-c", code, HF_HUB_OFFLINE="1")
    assert done.stdout.strip() == f"True True {MODEL} is in the cache: workers can start offline ->"


def test_a_whole_run_starts_offline_from_the_cache(machine: Machine, hub: Hub) -> None:
    machine.pull()
    hub.asked.clear()
    prompts = machine.home / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello", "max_tokens": 4}\n{"prompt": "there", "max_tokens": 4}\n')
    words = ("run", str(prompts), "-m", MODEL, "-q", "none", "-o", str(machine.home / "answers.jsonl"))
    done = machine.run("-m", "batchmill", *words, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert len((machine.home / "answers.jsonl").read_text().splitlines()) == 2
    assert hub.asked == []
    assert "fetching" not in done.stderr
