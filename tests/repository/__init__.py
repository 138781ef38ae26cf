"""Tests of the repository itself: its rooms, docs, packages and deployment files."""
