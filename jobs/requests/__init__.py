"""Values of one request and its answer, a file for each kind of request, and the states of both."""
