"""The contract of the store, on SQLite and on PostgreSQL."""
