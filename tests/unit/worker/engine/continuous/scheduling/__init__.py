"""Tests of `worker/engine/continuous/scheduling/`."""
