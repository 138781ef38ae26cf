"""Tests of `producer/requests/`."""
