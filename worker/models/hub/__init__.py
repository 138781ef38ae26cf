"""The Hugging Face Hub: which files a model needs, how they come, and why they do not."""
