"""The measurement of what quantization costs on a user's text: all of `batchmill evaluate` but its command line."""
