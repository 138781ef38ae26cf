"""The store: every query and every transaction. No SQL stands anywhere else."""
