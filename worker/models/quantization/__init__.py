"""The forms of a model's weights: quantized while loading, from a checkpoint, or as a copy."""
