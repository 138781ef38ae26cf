"""Tests of `jobs/models/`."""
