"""The command line, and everything that reads or writes users' files; imports neither worker nor torch."""
