"""Tests of `worker/evaluate/measures/`."""
