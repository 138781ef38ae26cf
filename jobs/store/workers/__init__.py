"""The rows of workers: their registration and heartbeats, which of them are alive, and which are idle."""
