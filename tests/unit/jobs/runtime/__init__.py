"""Tests of `jobs/runtime/`."""
