"""Tests of `worker/loop/`."""
