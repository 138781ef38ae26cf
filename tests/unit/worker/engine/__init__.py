"""Tests of `worker/engine/`."""
