"""The weights of a loaded model, laid out for speed."""
