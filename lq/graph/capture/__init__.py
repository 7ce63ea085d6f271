"""From a module to a graph of ATen operators, and the check that both compute the same."""
