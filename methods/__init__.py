"""Beyond the paper: one module per defence."""
