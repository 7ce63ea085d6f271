"""What a network takes and returns, as text in a file that need not be trusted."""
