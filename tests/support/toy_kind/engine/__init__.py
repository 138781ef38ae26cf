"""The engine that counts words."""
