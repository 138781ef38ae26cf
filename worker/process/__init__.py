"""The processes of a worker: which of them starts, watches and ends the others."""
