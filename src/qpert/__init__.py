"""Vision-language retrieval checkpoints, deployed: ONNX and TensorRT export, a PyTorch-free runtime, and a parity gate.

`runtime`, `graphs`, `exporter` and `calibration` are links to the folders of those names at the top of the repository,
so that every tool finds `qpert.runtime` where Python does. Nothing is imported here.
"""
