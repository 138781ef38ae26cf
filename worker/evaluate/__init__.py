"""What quantization costs on a user's own text: every part of `batchmill evaluate` but its command line."""
