"""Tests of `producer/cli/`."""
