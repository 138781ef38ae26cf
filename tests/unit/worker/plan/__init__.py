"""Tests of `worker/plan/`."""
