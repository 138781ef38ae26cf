"""Wake-ups through Redis: the client that sends them, the filter of what comes in, and the embedded server."""
