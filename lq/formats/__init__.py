"""File formats: each writes and reads one."""
