"""ONNX with quantize and dequantize nodes."""
