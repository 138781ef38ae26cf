"""Facts about a loaded model: its cache, its weights, and a first trial."""
