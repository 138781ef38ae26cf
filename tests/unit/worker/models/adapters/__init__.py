"""Tests of `worker/models/adapters/`."""
