"""What there is to say about jobs, read and computed. It makes no text."""
