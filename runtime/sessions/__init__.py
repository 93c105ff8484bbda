"""What runs a graph: ONNX Runtime and TensorRT behind one protocol."""
