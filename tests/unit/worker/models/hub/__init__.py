"""Tests of `worker/models/hub/`."""
