"""The Hub's refusals, tokens and failures: each is one line that says what to do."""

from __future__ import annotations

import socket
import time

import pytest

from tests.support.servers.hub_machine import MODEL, Machine, found
from tests.support.servers.hub_server import TOKEN, Hub, Repository, commit_of


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
