"""A tiny trained chat model, its corpus and its training script, so that everything runs with no download."""
