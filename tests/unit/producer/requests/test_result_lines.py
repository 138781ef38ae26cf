"""Lines of an export: JSON that every reader takes."""

from __future__ import annotations

import math

import pytest

from batchmill.producer.requests.result_lines import to_json


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_lacks_is_never_written(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"logprob": number})
