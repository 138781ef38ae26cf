"""The engine without a model: it answers with the prompt."""
