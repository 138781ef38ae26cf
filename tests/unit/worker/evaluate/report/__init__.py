"""Tests of `worker/evaluate/report/`."""
