"""Tests of `producer/cli/text/`."""
