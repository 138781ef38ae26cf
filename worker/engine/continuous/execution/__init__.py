"""The execution of a planned step on the device."""
