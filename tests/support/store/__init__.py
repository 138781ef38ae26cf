"""Stores for tests: filled, damaged, old, and judged by an oracle."""
