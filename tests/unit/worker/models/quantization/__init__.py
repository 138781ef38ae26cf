"""Tests of `worker/models/quantization/`."""
