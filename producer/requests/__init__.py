"""Lines of prompt files, as requests: a file for each kind of request, and the checks of values."""
