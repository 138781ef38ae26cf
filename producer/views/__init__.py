"""Views of jobs, read and computed, and the sentences that all commands share. No line for a terminal is made here."""
