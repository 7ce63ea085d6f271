"""What each tensor is rounded to: targets, and layers that are quantized in another way."""
