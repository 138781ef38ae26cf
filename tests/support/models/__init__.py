"""Tiny models, adapters and checkpoints, and the answers they are compared with."""
