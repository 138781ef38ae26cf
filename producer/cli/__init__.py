"""The command line: its commands, and all text for people."""
