"""Processes, terminals and installations for a test."""
