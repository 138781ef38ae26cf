"""Values about models: what a user names, how its weights are held, and what it is by its content."""
