"""Removes one guard of the mill at a time and shows which test goes red: `python -m tests.tools.mutants`."""
