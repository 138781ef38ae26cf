"""Tests of `worker/engine/generate/`."""
