"""The devices of a machine: selection, placement, locks and memory."""
