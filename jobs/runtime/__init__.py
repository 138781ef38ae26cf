"""The process that batchmill runs in: its home, files, logs, locks and ends. It knows no job."""
