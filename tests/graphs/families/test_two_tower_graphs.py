"""CLIP's and SigLIP's stages as ONNX graphs in ONNX Runtime, and in half precision, against the eager modules."""

import io
import logging
import warnings

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import torch
from our_towers import clip_texts, our_clip, our_siglip, siglip_config, siglip_texts
from stock_towers import pixels, stock_clip, stock_siglip

from qpert.graphs.families.blip2.model import GraphPerturbation
from qpert.graphs.families.clip import model as clip_model
from qpert.graphs.families.siglip import model as siglip_model
from qpert.graphs.families.siglip.model import SiglipRetrieval
from qpert.graphs.layers import LayerNorm
from qpert.graphs.perturbation.lowering import lower_query_map
from qpert.graphs.perturbation.oracle import key_subspaces
from qpert.graphs.perturbation.placeholder import query_map_placeholder

THRESHOLD = 0.9


def session(stage, inputs, axes):
    """The stage traced with some named axes (input → axis → name), lowered, in ONNX Runtime."""
    dims = {name: torch.export.Dim(name, min=1, max=64) for named in axes.values() for name in named.values()}
    shapes = tuple({place: dims[name] for place, name in axes.get(key, {}).items()} for key in inputs)
    buffer = io.BytesIO()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            stage.eval(), tuple(inputs.values()), dynamo=True, input_names=list(inputs), dynamic_shapes=shapes,
            opset_version=20, verbose=False,
        )  # fmt: skip
    program.save(buffer)
    model = gs.export_onnx(lower_query_map(gs.import_onnx(onnx.load_from_string(buffer.getvalue()))))
    model.ir_version = 10
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(session, **inputs):
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]


def test_clip_texts_of_any_number_and_length():
    stock = stock_clip("a")
    model = our_clip(stock)
    ids, _ = clip_texts(stock, 11)
    axes = {"input_ids": {0: "T", 1: "L"}}
    graph = session(clip_model.STAGES["text"](model), {"input_ids": ids[:4, :7]}, axes)
    for count, length in ((11, ids.shape[1]), (1, 5), (3, 2), (2, 1)):
        some = ids[:count, :length]
        np.testing.assert_allclose(run(graph, input_ids=some), model.encode_text(some).numpy(), rtol=0, atol=1e-5)


def test_siglip_boxes_in_any_number_with_the_lowered_query_map():
    stock = stock_siglip("a")
    eager = our_siglip(stock, GraphPerturbation(THRESHOLD))
    traced = SiglipRetrieval(siglip_config(stock), GraphPerturbation(THRESHOLD), query_map=query_map_placeholder)
    traced.load_state_dict(eager.state_dict())
    generator = torch.Generator().manual_seed(2)
    tokens = eager.encode_image(pixels(49, 5))
    masks = torch.rand(5, 6, 49, generator=generator) * (torch.rand(5, 6, 49, generator=generator) < 0.3)
    cuts = key_subspaces(eager.keys(tokens), masks, threshold=THRESHOLD)
    clear = torch.minimum(cuts.margins, cuts.gaps).flatten(2).amin(-1) > 1e-4  # what float32 can decide
    weights = 3 * clear.float()
    example = {"image_embeds": tokens[:2], "object_masks": masks[:2, :3], "box_weights": weights[:2, :3]}
    axes = {"image_embeds": {0: "B"}, "object_masks": {0: "B", 1: "O"}, "box_weights": {0: "B", 1: "O"}}
    graph = session(siglip_model.STAGES["image_query"](traced), example, axes)
    for images, count in ((5, 6), (1, 1), (3, 0)):
        inputs = (tokens[:images], masks[:images, :count], weights[:images, :count])
        expected = eager.encode_queries(*inputs)
        got = run(graph, image_embeds=inputs[0], object_masks=inputs[1], box_weights=inputs[2])
        np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=1e-4)
    moved = (eager.encode_queries(tokens, masks, weights) - eager.encode_queries(tokens)).abs().amax((1, 2))
    assert moved.min() > 1e-2, "boxes that change nothing would show nothing"
    assert torch.equal(expected, eager.encode_queries(tokens[:3]))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_half_precision_stays_near_and_hands_over_what_numpy_knows(family, dtype, limit):
    if family == "clip":
        stock, module, make, texts = stock_clip("a"), clip_model, our_clip, clip_texts
        ids, extra = texts(stock)[0], ()
    else:
        stock, module, make, texts = stock_siglip("a"), siglip_model, our_siglip, siglip_texts
        ids, extra = texts(stock), (torch.rand(3, 2, 49), torch.zeros(3, 2))
    full, half = make(stock), make(stock).to(dtype)
    for layer in half.modules():
        if isinstance(layer, LayerNorm):
            layer.float()
    images = pixels(49)
    features = module.STAGES["vision"](half)(images)
    assert features.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    queries = module.STAGES["image_query"](half)(features, *extra)
    vectors = module.STAGES["text"](half)(ids)
    assert queries.dtype == vectors.dtype == torch.float32
    assert (queries - full.encode_queries(full.encode_image(images))).abs().max() < limit
    assert (vectors - full.encode_text(ids)).abs().max() < limit
