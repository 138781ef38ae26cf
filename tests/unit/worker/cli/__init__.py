"""Tests of `worker/cli/`."""
