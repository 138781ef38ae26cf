"""Tests of `worker/engine/grammar/`."""
