"""Tests of `producer/cli/local/`."""
