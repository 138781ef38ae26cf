"""Tests of `worker/engine/continuous/execution/`."""
