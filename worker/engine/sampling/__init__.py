"""Sampling: one file an option, and the sampler that applies them in order."""
