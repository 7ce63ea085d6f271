"""From a module to a graph of ATen operators, and whether both compute the same."""
