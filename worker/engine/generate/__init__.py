"""The engine over transformers' `generate`, in micro-batches."""
