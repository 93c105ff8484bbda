"""What the Python runtime does around the network, as ONNX graphs that any application can run.

`preprocess` makes `pixel_values` of a picture, `boxes` makes `object_masks` and `box_weights` of boxes in pixels. Both
are generated from what the manifest declares, hold no weights, and need the onnx library alone.
"""
