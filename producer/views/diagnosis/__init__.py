"""The reason why a job moves or does not."""
