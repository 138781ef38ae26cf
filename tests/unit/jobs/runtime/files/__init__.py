"""Tests of `jobs/runtime/files/`."""
