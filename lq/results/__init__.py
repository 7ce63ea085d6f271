"""What was measured and decided, as plain values: the report of layers, the analysis."""
