"""Transactions that begin, end and reopen jobs."""
