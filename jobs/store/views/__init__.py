"""Questions about jobs, workers and models. Nothing here writes but what was measured."""
