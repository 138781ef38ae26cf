"""Leases of batches: the order of the queue, claim, sync, recovery and blame."""
