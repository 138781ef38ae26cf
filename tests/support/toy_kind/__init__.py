"""A kind of request that counts words, as a new kind would be added: a file for each side, and an engine folder."""
