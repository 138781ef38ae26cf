"""Tests of `jobs/store/database/`."""
