"""Constrained decoding: grammars of response_format, and matchers that follow an answer."""
