"""Files of users: prompt files in, answers out."""
