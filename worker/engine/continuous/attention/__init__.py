"""The attention of a step over the KV cache, by the backend that serves the device best."""
