"""Tests of `worker/engine/continuous/weights/`."""
