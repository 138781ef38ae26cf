"""Other programs that users could pick, given the same weights, requests and threads, each at its best setting."""
