"""The continuous engine: requests enter and leave at every token step."""
