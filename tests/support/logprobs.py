"""Logprobs of one answer, as the engine gives them."""

from __future__ import annotations

LOGPROBS = {
    "content": [
        {
            "token": "he",
            "logprob": -0.1,
            "bytes": [104, 101],
            "top_logprobs": [
                {"token": "he", "logprob": -0.1, "bytes": [104, 101]},
                {"token": "ho", "logprob": -2.5, "bytes": [104, 111]},
            ],
        },
        {"token": "y", "logprob": -0.5, "bytes": [121], "top_logprobs": []},
    ]
}
