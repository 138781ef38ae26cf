"""The report of an evaluation: its table, advice and chart."""
