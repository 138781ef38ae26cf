"""Tests of `worker/process/`."""
