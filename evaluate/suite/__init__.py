"""One module per test. Each scores pictures or predictions into rows, and turns rows into metrics with intervals."""
