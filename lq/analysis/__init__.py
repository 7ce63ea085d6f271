"""What rounding costs, layer by layer: noise, sensitivity and time."""
