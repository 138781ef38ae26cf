"""The JSON text of what the store keeps."""

from __future__ import annotations

import math

import pytest

from batchmill.jobs.requests.request import to_text


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_lacks_is_never_stored(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_text({"logprob": number})
