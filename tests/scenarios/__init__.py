"""Races, histories and whole files, without processes."""
