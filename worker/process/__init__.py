"""The processes of a worker: who starts, watches and ends whom."""
