"""What a network takes and gives, as text that a file can hold and a stranger may have written."""
