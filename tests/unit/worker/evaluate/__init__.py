"""Tests of `worker/evaluate/`."""
