"""Tests of `producer/`."""
