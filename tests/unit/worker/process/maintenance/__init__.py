"""Tests of `worker/process/maintenance/`."""
