"""What the tests share: networks, modules, data, fits, references, and processes."""
