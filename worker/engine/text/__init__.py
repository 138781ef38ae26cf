"""Text and tokens: prompts into tokens, tokens into answers."""
