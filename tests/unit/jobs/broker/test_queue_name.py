"""Names of queues: equal specs share one, and every name is safe in Redis."""

from __future__ import annotations

import re
from uuid import uuid4

from hypothesis import given

from batchmill.jobs.broker.queue_name import old_queue_name, queue_name
from batchmill.jobs.models.spec import ModelSpec
from tests.support.model_specs import specs


@given(specs, specs)
def test_equal_specs_share_a_queue_and_different_ones_do_not(one: ModelSpec, other: ModelSpec) -> None:
    assert (one == other) == (queue_name(one, "a") == queue_name(other, "a"))
    assert queue_name(one, "a") != queue_name(other, "b")


@given(specs)
def test_queue_names_are_safe_in_redis(spec: ModelSpec) -> None:
    assert re.fullmatch(r"bm-[a-z0-9-]{1,24}-[0-9a-f]{12}", queue_name(spec, uuid4().hex))
    assert re.fullmatch(r"bm-[a-z0-9-]{1,24}-[0-9a-f]{12}", old_queue_name(spec))
