"""The commands of a machine with a device: `worker`, `plan`, `evaluate` and `models`."""
