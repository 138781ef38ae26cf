"""The parent's regular work: leases, wake-ups, orphans, and its child's death."""
