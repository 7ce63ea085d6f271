"""Run by tests as processes of their own."""
