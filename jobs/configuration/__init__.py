"""Settings, from the environment, batchmill.toml and the flags of commands."""
