"""What the Python runtime does around the network, in files that any application can use.

`preprocess.onnx` makes `pixel_values` of a picture, `boxes.onnx` makes `object_masks` and `box_weights` of boxes in
pixels, `tokenizer.json` cleans, cuts and frames captions. The graphs are generated from what the manifest declares and
hold no weights.
"""
