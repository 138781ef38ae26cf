"""Chat templates: messages and tools to the text of a prompt."""
