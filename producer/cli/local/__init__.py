"""The whole mill on one machine, with Redis, store and workers: for one file (`run`), or until Ctrl-C (`up`)."""
