"""The database under the store: connections, transactions, clock and conflicts, on SQLite and PostgreSQL."""
