"""Export, verify and load: from the INT8 network to a file that an engine runs."""
