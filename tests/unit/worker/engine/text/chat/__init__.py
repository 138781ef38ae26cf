"""Tests of `worker/engine/text/chat/`."""
