"""The way from a ModelSpec to a model on its device."""
