"""Tests of `producer/views/`."""
