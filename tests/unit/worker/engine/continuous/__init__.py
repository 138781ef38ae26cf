"""Tests of `worker/engine/continuous/`."""
