"""A copy of a bundle's query head that also gives the attention of its queries over the picture.

The probabilities are inside the graph already, as the output of each cross-attention's softmax. The copy makes them an
output; no other node changes, and the weights stay in the bundle's data file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.bundle.roles import IMAGE_TOKENS, IMAGE_VECTORS
from qpert.runtime.errors import BundleError

OUTPUT = "attention"


def write_attention_graph(bundle: Path, head: GraphSpec, path: Path) -> dict[str, Any]:
    """Write the copy to `path`, and say in the manifest's form what was added.

    The new output is float32 [B, layers, heads, Q, N]: for every cross-attention, how much of each query's attention
    is on each image token; it sums to 1 over N. N and Q come from the declared shapes of the query head.

    Raises:
        BundleError: no softmax of the graph has that shape.
    """
    model = onnx.load(bundle / head.file, load_external_data=False)
    queries, tokens = head.output(IMAGE_VECTORS).shape[1], head.input(IMAGE_TOKENS).shape[1]
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in model.graph.value_info
    }
    found = [
        node.output[0]
        for node in model.graph.node
        if node.op_type == "Softmax" and shapes.get(node.output[0], [])[-2:] == [queries, tokens]
    ]
    if not found:
        raise BundleError(
            f"{bundle / head.file} has no softmax of {queries} queries over {tokens} image tokens; attention can be "
            "shown for models whose queries look at the picture, such as blip2",
            code="no-cross-attention",
        )
    heads = shapes[found[0]][1]
    model.graph.initializer.append(onnx.helper.make_tensor("attention_axis", onnx.TensorProto.INT64, [1], [1]))
    layers = [f"attention_layer_{index}" for index in range(len(found))]
    for softmax, layer in zip(found, layers, strict=True):
        model.graph.node.append(onnx.helper.make_node("Unsqueeze", [softmax, "attention_axis"], [layer]))
    model.graph.node.append(onnx.helper.make_node("Concat", layers, [OUTPUT], axis=1))
    shape = ["B", len(found), heads, queries, tokens]
    model.graph.output.append(onnx.helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, shape))
    path.write_bytes(model.SerializeToString())
    return {"name": OUTPUT, "slot": OUTPUT, "dtype": "float32", "shape": shape}
