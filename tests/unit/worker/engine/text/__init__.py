"""Tests of `worker/engine/text/`."""
