"""Tests of `producer/files/`."""
