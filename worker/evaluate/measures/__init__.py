"""The measures of what a quantization costs."""
