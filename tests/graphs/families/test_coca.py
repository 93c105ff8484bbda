"""CoCa's modules against PyTorch's own attention, hand-computed masks and a direct eigendecomposition.

Stock open_clip, from the checkpoint on, is compared in tests/exporter/families/test_coca_end_to_end.py.
"""

import pytest
import torch
from stock_towers import randomised
from torch import nn
from torch.nn import functional as F

from qpert.graphs.families.coca.config import CONFIGS, CocaConfig
from qpert.graphs.families.coca.model import CocaRetrieval
from qpert.graphs.perturbation.choices import GraphPerturbation
from qpert.graphs.transformer import TextConfig, VisionConfig

LENGTH = 9
HEADS = {"96": (192, 2), "64": (128, 2), "one packed width": (48, 3)}
"""Width of the pooler and its heads: 96 as L/14, 64 as B/32, and as wide as the tokens."""


def config(embed_dim=192, heads=2):
    encoder = (48, 2, 3, 96, "gelu", 1e-5)
    text = TextConfig(24, 2, 2, 48, "gelu", 1e-5, 60, LENGTH)
    return CocaConfig("small", VisionConfig(*encoder, 42, 7), text, embed_dim, heads)


def network(embed_dim=192, heads=2, perturbation=None, seed=0):
    model = randomised(CocaRetrieval(config(embed_dim, heads), perturbation), seed)
    with torch.no_grad():  # what `randomised` does not know
        model.pooler.query.copy_(torch.randn(1, embed_dim, generator=torch.Generator().manual_seed(seed)))
        model.text.cls_emb.copy_(torch.randn(24, generator=torch.Generator().manual_seed(seed + 1)))
    return model


def image_tokens(images=2, seed=3):
    return torch.randn(images, 37, 48, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("embed_dim", "heads"), HEADS.values(), ids=HEADS)
def test_the_pooler_is_pytorchs_multihead_attention(embed_dim, heads):
    model, tokens = network(embed_dim, heads), image_tokens()
    pooler = model.pooler
    stock = nn.MultiheadAttention(embed_dim, heads, kdim=48, vdim=48, batch_first=True)
    parts = [pooler.q_proj, pooler.k_proj, pooler.v_proj]
    with torch.no_grad():
        if embed_dim == 48:
            stock.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        else:
            for name, part in zip("qkv", parts, strict=True):
                getattr(stock, f"{name}_proj_weight").copy_(part.weight)
        stock.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        stock.out_proj.load_state_dict(pooler.out_proj.state_dict())
        keys = F.layer_norm(tokens, (48,), pooler.ln_k.weight, pooler.ln_k.bias)
        query = F.layer_norm(pooler.query, (embed_dim,), pooler.ln_q.weight, pooler.ln_q.bias)
        pooled = stock(query.expand(2, -1, -1), keys, keys, need_weights=False)[0]
        normed = F.layer_norm(pooled, (embed_dim,), model.ln_post.weight, model.ln_post.bias)
        expected = F.normalize(normed @ model.proj, dim=-1)
        found = model.encode_queries(tokens)
    # the same float32 operations in another order, on vectors of length 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("preserve_norm", [False, True])
@pytest.mark.parametrize(("embed_dim", "heads"), HEADS.values(), ids=HEADS)
def test_a_box_moves_the_query_by_the_projector_of_its_keys(embed_dim, heads, preserve_norm):
    """q' = q + Σ w q P with P from `eigh` of each head's masked keys, written out head by head and box by box."""
    model = network(embed_dim, heads, GraphPerturbation(0.9, preserve_norm))
    tokens, generator = image_tokens(), torch.Generator().manual_seed(4)
    masks = torch.rand(2, 3, 37, generator=generator).round(decimals=1)
    masks[:, :, 0] = 0  # CLS
    masks[:, 2] = 0  # a box that covers nothing
    weights = torch.tensor([[0.4, 1.0, 0.7], [0.2, -0.5, 1.0]])
    pooler, size = model.pooler, embed_dim // heads
    expected = []
    with torch.no_grad():
        for image in range(2):
            x = pooler.ln_k(tokens[image])
            keys, values = (pooler.k_proj(x).double(), pooler.v_proj(x).double())
            query = pooler.q_proj(pooler.ln_q(pooler.query))[0].double()
            context = torch.cat(
                [
                    attended(
                        query, keys, values, masks[image].double(), weights[image].double(), head, size, preserve_norm
                    )
                    for head in range(heads)
                ]
            )
            pooled = model.ln_post(pooler.out_proj(context.float()))
            expected.append(F.normalize(pooled @ model.proj, dim=-1))
        found = model.encode_queries(tokens, masks, weights)[:, 0]
        stock = model.encode_queries(tokens)[:, 0]
    # float32 attention against float64
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=2e-6)
    assert (found - stock).abs().max() > 1e-3, "boxes that change nothing would show nothing"


def attended(query, keys, values, masks, weights, head, size, preserve_norm):
    part = slice(head * size, (head + 1) * size)
    q, k, v = query[part], keys[:, part], values[:, part]
    moved = q.clone()
    for mask, weight in zip(masks, weights, strict=True):
        covered = mask[:, None] * k
        if not covered.any():
            continue
        energies, vectors = torch.linalg.eigh(covered.T @ covered)
        energies, vectors = energies.flip(0), vectors.flip(1)
        rank = max(1, int((energies.cumsum(0) / energies.sum() < 0.9).sum()))
        moved += weight * vectors[:, :rank] @ (vectors[:, :rank].T @ q)
    if preserve_norm:
        moved *= q.norm() / moved.norm()
    return torch.softmax(k @ moved / size**0.5, dim=0) @ v


def test_zero_weights_and_no_boxes_are_the_stock_model_bit_for_bit():
    model, tokens = network(perturbation=GraphPerturbation(0.9)), image_tokens()
    with torch.no_grad():
        stock = model.encode_queries(tokens)
        masks = torch.rand(2, 3, 37, generator=torch.Generator().manual_seed(4))
        torch.testing.assert_close(model.encode_queries(tokens, masks, torch.zeros(2, 3)), stock, rtol=0, atol=0)
        none = model.encode_queries(tokens, torch.zeros(2, 0, 37), torch.zeros(2, 0))
        torch.testing.assert_close(none, stock, rtol=0, atol=0)


def test_the_mask_hides_what_the_legacy_rule_hides():
    """Key j is seen unless it comes later, or token j − 1 is padding: here of the texts [7,0,5] and [7,5], L = 3."""
    model = network()
    found = model.text.mask(torch.tensor([[7, 0, 5], [7, 5, 0]]))[:, 0] == 0  # keys: 3 tokens, padding, class token
    assert found[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],  # behind the 0, which may be "!", the third token does not see itself
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 0],  # the class token sees one padding token, and not itself
    ]
    assert found[1, 4].int().tolist() == [1, 1, 1, 0, 0], "the padding column of the text is the one that is seen"


def test_behind_a_text_of_full_length_the_class_token_sees_itself_and_no_padding():
    model = network()
    found = model.text.mask(torch.full((1, LENGTH), 5))[0, 0, -1] == 0
    assert found.int().tolist() == [1] * LENGTH + [0, 1]
    cut = torch.full((1, LENGTH), 5)
    cut[0, -1] = 0
    assert (model.text.mask(cut)[0, 0, -1] == 0).int().tolist() == [1] * LENGTH + [0, 0]


def stock_text(model, ids):
    """open_clip's text branch written out for full-length rows with PyTorch's attention, one row at a time."""
    text, vectors = model.text, []
    for row in ids:
        length = len(row)
        x = torch.cat([text.token_embedding(row), text.cls_emb[None]]) + text.positional_embedding
        seen = torch.tensor([True, *(row != 0).tolist()])
        hidden = torch.full((length + 1, length + 1), float("-inf")).triu(1)
        hidden[:, ~seen] = float("-inf")
        for layer in text.encoder.layers:
            normed = layer.layer_norm1(x)
            attention = layer.self_attn
            q, k, v = (part(normed).unflatten(-1, (2, -1)).transpose(0, 1) for part in parts(attention))
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden)
            x = x + attention.out_proj(context.transpose(0, 1).flatten(1))
            x = x + layer.mlp(layer.layer_norm2(x))
        last = F.layer_norm(x[-1], (x.shape[-1],), text.ln_final.weight, text.ln_final.bias)
        vectors.append(F.normalize(last @ text.text_projection, dim=-1))
    return torch.stack(vectors)


def parts(attention):
    return attention.q_proj, attention.k_proj, attention.v_proj


def test_every_shorter_length_gives_the_vector_of_the_padded_text():
    model = network()
    ids = torch.tensor([[58, 4, 59, 0, 0, 0, 0, 0, 0], [58, 0, 7, 0, 9, 59, 0, 0, 0], [58, *range(3, 10), 59]])
    with torch.no_grad():
        expected = stock_text(model, ids)
        for row, tokens in enumerate((3, 6, 9)):
            for length in range(tokens, LENGTH + 1):
                found = model.encode_text(ids[row : row + 1, :length])
                # float32 sums of other lengths
                torch.testing.assert_close(found, expected[row : row + 1], rtol=0, atol=2e-6)
        cut = model.encode_text(ids[2:3, :8])
    assert (cut - expected[2]).abs().max() > 1e-3, "a cut text has another vector"


def test_published_models_have_the_published_sizes():
    parameters = {}
    for name, one in CONFIGS.items():
        with torch.device("meta"):
            parameters[name] = sum(p.numel() for p in CocaRetrieval(one).parameters())
    # open_clip's counts of both towers, less the 255 queries that retrieval does not read
    assert parameters["coca_ViT-L-14"] == 306_724_864 + 123_651_072 - 255 * 768
    assert parameters["coca_ViT-B-32"] == 89_164_032 + 63_428_608 - 255 * 512
