"""Tests of `jobs/broker/`."""
