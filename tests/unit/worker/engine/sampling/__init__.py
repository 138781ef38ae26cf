"""Tests of `worker/engine/sampling/`."""
