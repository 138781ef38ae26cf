"""The loop between the store and the engine; it knows no tensor."""
