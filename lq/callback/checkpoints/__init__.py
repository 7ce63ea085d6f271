"""What checkpoints hold of quantization."""
