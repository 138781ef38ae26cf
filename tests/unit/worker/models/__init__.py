"""Tests of `worker/models/`."""
