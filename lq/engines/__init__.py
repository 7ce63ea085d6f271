"""What runs a file: one class for each engine, all called alike."""
