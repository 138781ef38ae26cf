"""Tests of `jobs/runtime/process/`."""
