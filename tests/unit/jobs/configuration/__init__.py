"""Tests of `jobs/configuration/`."""
