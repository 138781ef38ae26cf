"""What users could pick instead, given the same weights, requests and threads, each at the best of its settings."""
