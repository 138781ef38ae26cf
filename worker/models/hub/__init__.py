"""The Hugging Face Hub: the files that a model needs, their download, and its errors."""
