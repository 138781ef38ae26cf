"""Forged messages to a real worker: it lives, works on, and says in a line what it dropped, without a word of it."""

# ruff: noqa: F811  (the fixture of the integration tests)
from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import redis

from batchmill.jobs.broker.message_filter import made_anew
from tests.integration.conftest import PATIENCE_SECONDS, Mill, mill, until, write_prompts  # noqa: F401

CANARY = "canaryword"


def forged(body: Any = None, /, *, headers: dict[str, Any] | None = None, **envelope: Any) -> bytes:
    """A wake-up with parts of its own; `body` is bytes, or becomes JSON."""
    message = json.loads(made_anew(1, "bm-echo"))
    message["headers"] |= headers or {}
    if body is not None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        message["body"] = base64.b64encode(raw).decode()
    return json.dumps(message | envelope).encode()


class _Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (Path(self.path),)


def hostile(proof: Path) -> list[bytes]:
    """Every message here would harm a worker that took it; unpickling one would leave the folder `proof`."""
    pickled = pickle.dumps([[_Bomb(str(proof))], {}, {}])
    link = {"task": "batchmill.wake", "args": [1], "options": {"queue": "bm-echo"}}
    return [
        pickled,
        CANARY.encode(),
        b"\xff\x00" + CANARY.encode(),
        b"{",
        b"[]",
        b"{}",
        b"[" * 100_000,
        json.dumps({"properties": {}, "body": CANARY}).encode(),
        forged(pickled, **{"content-type": "application/x-python-serialize", "content-encoding": "binary"}),
        forged(pickled, **{"content-type": "pickle"}),
        forged(b"- !!python/object/apply:os.system [true]", **{"content-type": "application/x-yaml"}),
        forged(CANARY.encode()),
        forged([[CANARY], {}, {}]),
        forged([["1; DROP TABLE jobs"], {}, {}]),
        forged([["x" * 2**20], {}, {}]),
        forged([[1, 2], {"word": CANARY}, {}]),
        forged([[1], {}, {}], headers={"compression": "application/x-gzip"}),
        forged(zlib.compress(b"0" * 2**26), headers={"compression": "application/x-gzip"}),
        forged(headers={"task": f"{CANARY}.task"}),
        forged([[link], {}, {}], headers={"task": "celery.chord"}),
        forged([[link, [[1]]], {}, {}], headers={"task": "celery.map"}),
        # These are taken, for the id that is in them, and nothing else of them is.
        forged(headers={"timelimit": [0.001, 0.001], "eta": "bad", "expires": "2001-01-01T00:00:00", "retries": 9}),
        forged([[10**9], {}, {"callbacks": [link], "errbacks": [link], "chain": [link], "chord": link}]),
    ]


def test_forged_messages_are_dropped_and_the_worker_lives(mill: Mill, tmp_path: Path) -> None:
    worker = mill.start("worker", "-m", "echo", log_level="debug")
    until(lambda: mill.store.workers.rows(), "a worker")
    messages = hostile(tmp_path / "proof")
    with redis.Redis(unix_socket_path=str(mill.settings.redis_socket)) as client:
        client.lpush(key := f"batchmill:{mill.echo_queue}", *messages)
        client.lpush(f"{key}\x06\x169", b"{")  # another priority of the same queue
        until(lambda: not client.exists(key, f"{key}\x06\x169"), "the queue is drained")
        job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 20), "-m", "echo").strip()
        mill.command("wait", job_id, "--timeout", "300")
        until(lambda: not client.exists("batchmill:unacked"), "nothing waits to be given out again")
    assert worker.poll() is None, "the same process as before"
    assert [row.generation for row in mill.store.workers.rows()] == [1], "and the same child"
    worker.terminate()
    said, _ = worker.communicate(timeout=PATIENCE_SECONDS)
    dropped = [line for line in said.splitlines() if "no wake-up was dropped" in line]
    assert len(dropped) == len(messages) - 2 + 1
    assert CANARY not in said
    assert "Traceback" not in said
    assert max(len(line) for line in said.splitlines()) < 300
    assert not (tmp_path / "proof").exists()


def test_a_key_of_the_wrong_kind_does_not_end_a_worker(mill: Mill, tmp_path: Path) -> None:
    worker = mill.start("worker", "-m", "echo")
    until(lambda: mill.store.workers.rows(), "a worker")
    with redis.Redis(unix_socket_path=str(mill.settings.redis_socket)) as client:
        until(lambda: client.info("clients")["blocked_clients"], "the worker waits in BRPOP")
        client.set(key := f"batchmill:{mill.echo_queue}", CANARY)
        until(lambda: not client.info("clients")["blocked_clients"], "the worker was refused")
        client.delete(key)
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 20), "-m", "echo").strip()
    mill.command("wait", job_id, "--timeout", "300")
    assert worker.poll() is None
    worker.terminate()
    said, _ = worker.communicate(timeout=PATIENCE_SECONDS)
    assert CANARY not in said
