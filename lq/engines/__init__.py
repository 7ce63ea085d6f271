"""What runs a file: one class for each engine, all with the same interface."""
