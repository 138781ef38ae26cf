"""Tests of `worker/evaluate/data/`."""
