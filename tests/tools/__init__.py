"""Programs for developers: benchmarks, mutants and the soak."""
