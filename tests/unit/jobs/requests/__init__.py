"""Tests of `jobs/requests/`."""
