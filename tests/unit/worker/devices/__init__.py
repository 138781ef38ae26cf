"""Tests of `worker/devices/`."""
