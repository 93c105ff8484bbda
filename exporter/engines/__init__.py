"""ONNX graphs to TensorRT engines, with classic TensorRT or TensorRT-RTX."""
