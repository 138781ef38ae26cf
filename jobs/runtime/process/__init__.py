"""Processes: their environment, signals, standard files, and how one is told from another."""
