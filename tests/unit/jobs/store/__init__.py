"""Tests of `jobs/store/`."""
