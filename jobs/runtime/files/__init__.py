"""Files that batchmill reads, writes and locks."""
