"""Tests of `producer/views/diagnosis/`."""
