"""The plan of each step, in plain Python: rows, places of the cache, limits."""
