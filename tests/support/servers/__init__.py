"""Servers and proxies that run for a test."""
