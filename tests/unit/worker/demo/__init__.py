"""Tests of `worker/demo/`."""
