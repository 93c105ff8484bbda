"""INT8 and FP8 bundles: explicit Q/DQ in the graphs, ranges from data, and a gate on recall.

bundle ─ ranges ─ quantise (ONNX Runtime or ModelOpt) ─ sensitivity ─┬─ write ─ gate ─ bundle
                                                                      └─ worst blocks in float ────┘
"""
