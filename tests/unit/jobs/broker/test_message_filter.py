"""The filter of a queue's messages: a worker sees one task and one id, and nothing else that anybody wrote."""

from __future__ import annotations

import base64
import json
import pickle
import subprocess
import sys
from typing import Any
from unittest.mock import Mock

import pytest
from kombu import Queue
from kombu.transport import TRANSPORT_ALIASES, virtual

from batchmill.jobs.broker import message_filter
from batchmill.jobs.broker.client import make_app
from batchmill.jobs.broker.message_filter import NoWakeUp, batch_id_of, made_anew


def forged(**changes: Any) -> bytes:
    """A wake-up of batch 7 with other words in its envelope; None removes one."""
    message = json.loads(made_anew(7, "bm-echo"))
    for path, value in changes.items():
        place = message
        *parents, last = path.split("__")
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last.replace("_", "-") if last.startswith("content") else last] = value
    return json.dumps(message).encode()


def body(content: Any) -> str:
    return base64.b64encode(content if isinstance(content, bytes) else json.dumps(content).encode()).decode()


def test_a_message_is_made_anew_from_its_id_alone() -> None:
    written = forged(
        body=body([[7], {}, {"callbacks": [{"task": "evil"}], "chain": [{"task": "evil"}]}]),
        headers__eta="2999-01-01T00:00:00",
        headers__timelimit=[1, 1],
        headers__reply_to="evil",
        properties__delivery_tag="evil",
        properties__reply_to="evil",
        properties__delivery_info={"exchange": "evil", "routing_key": "evil"},
    )
    again = made_anew(batch_id_of(written), "bm-echo")
    assert batch_id_of(again) == 7
    assert b"evil" not in again
    assert set(json.loads(again)["headers"]) == {"task", "id", "lang"}
    assert base64.b64decode(json.loads(again)["body"]) == b"[[7], {}, {}]"


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        pytest.param(b"", "not JSON", id="nothing"),
        pytest.param(b"\xff\xfe", "not JSON", id="bytes"),
        pytest.param(pickle.dumps(7), "not JSON", id="pickle"),
        pytest.param(b"--- !!python/object/apply:os.system ['true']", "not JSON", id="yaml"),
        pytest.param(b"[" * 10_000, "not JSON", id="deep"),
        pytest.param(b"9" * 5_000, "not JSON", id="digits"),
        pytest.param(b"[]", "the message is no JSON object", id="list"),
        pytest.param(b"{}", "headers is no JSON object", id="empty"),
        pytest.param(forged(properties=[]), "properties is no JSON object", id="properties"),
        pytest.param(forged(content_type="application/x-python-serialize"), "not plain JSON", id="content type"),
        pytest.param(forged(content_encoding="binary"), "not plain JSON", id="encoding"),
        pytest.param(forged(headers__compression="application/x-gzip"), "not plain JSON", id="compressed"),
        pytest.param(forged(properties__body_encoding="other"), "not plain JSON", id="body encoding"),
        pytest.param(forged(headers__task="celery.chord"), "another task", id="builtin task"),
        pytest.param(forged(headers__task="os.system"), "another task", id="unknown task"),
        pytest.param(forged(headers__task=["batchmill.wake"]), "another task", id="no name"),
        pytest.param(forged(body=5), "not base64", id="body"),
        pytest.param(forged(body="?"), "not base64", id="no base64"),
        pytest.param(forged(body=body(pickle.dumps([[7], {}, {}]))), "not JSON", id="pickled body"),
        pytest.param(forged(body=body({"args": [7]})), "not one id", id="old protocol"),
        pytest.param(forged(body=body([["7"], {}, {}])), "not one id", id="text"),
        pytest.param(forged(body=body([["1; DROP TABLE jobs"], {}, {}])), "not one id", id="SQL"),
        pytest.param(forged(body=body([[True], {}, {}])), "not one id", id="boolean"),
        pytest.param(forged(body=body([[7.0], {}, {}])), "not one id", id="float"),
        pytest.param(forged(body=body([[0], {}, {}])), "not one id", id="zero"),
        pytest.param(forged(body=body([[2**63], {}, {}])), "not one id", id="large"),
        pytest.param(forged(body=body([[], {}, {}])), "not one id", id="none"),
        pytest.param(forged(body=body([[7, 8], {}, {}])), "not one id", id="two"),
        pytest.param(forged(body=body([[7], {"more": 1}, {}])), "not one id", id="keywords"),
        pytest.param(forged(body=body([["a" * 2**20], {}, {}])), "more than 16,384 bytes", id="long"),
    ],
)
def test_whatever_else_is_refused_with_a_reason_that_quotes_nothing(item: bytes, reason: str) -> None:
    with pytest.raises(NoWakeUp, match=reason) as caught:
        batch_id_of(item)
    assert len(str(caught.value)) < 80


def test_what_a_broker_sends_is_a_wake_up() -> None:
    app = make_app("memory://")
    with app.connection_for_write() as connection:
        queue = Queue("bm-echo")
        app.signature("batchmill.wake").apply_async((7,), queue=queue, producer=app.amqp.Producer(connection))
        sent = connection.default_channel._get("bm-echo")
    assert batch_id_of(json.dumps(sent).encode()) == 7


@pytest.mark.parametrize("url", ["redis://host/0", "rediss://host/0", "redis+socket:///redis.sock"])
def test_every_connection_goes_through_the_gate(url: str) -> None:
    app = make_app(url)
    with app.connection_for_read() as connection, connection.clone() as cloned:
        for each in (connection, cloned):
            assert type(each.transport).__module__ == "batchmill.jobs.broker.message_filter"
    aliases = {TRANSPORT_ALIASES[name] for name in ("redis", "rediss")}
    assert aliases == {"batchmill.jobs.broker.message_filter:Transport"}


def test_a_worker_has_no_task_but_its_own() -> None:
    code = (
        "import batchmill.worker.process.app; from batchmill.jobs.broker.client import make_app;"
        "app = make_app('redis://h');"
        "app.loader.import_default_modules(); print(*app.tasks)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["batchmill.wake"]


def test_an_acknowledgement_that_fails_does_not_stop_the_next_wake_up() -> None:
    qos = message_filter.Channel.QoS(Mock(), prefetch_count=1)
    qos._remove_from_indices = Mock(side_effect=ConnectionResetError)  # type: ignore[method-assign]
    virtual.QoS.append(qos, Mock(), "tag")
    assert not qos.can_consume()
    with pytest.raises(ConnectionResetError):
        qos.ack("tag")
    assert qos.can_consume()
