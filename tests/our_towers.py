"""Our CLIP and SigLIP modules with the weights of small stock models, and texts for them."""

import torch

from qpert.graphs.families.clip.config import ClipConfig
from qpert.graphs.families.clip.model import ClipRetrieval
from qpert.graphs.families.siglip.config import SiglipConfig
from qpert.graphs.families.siglip.model import SiglipRetrieval
from qpert.graphs.transformer import TextConfig, VisionConfig, interpolate_positions

CLIP_UNUSED = ["logit_scale"]
SIGLIP_UNUSED = ["logit_bias", "logit_scale"]


def _encoder(part):
    return (
        part.hidden_size,
        part.num_hidden_layers,
        part.num_attention_heads,
        part.intermediate_size,
        part.hidden_act,
        part.layer_norm_eps,
    )


def clip_config(stock):
    vision, text = stock.config.vision_config, stock.config.text_config
    return ClipConfig(
        "small",
        VisionConfig(*_encoder(vision), vision.image_size, vision.patch_size),
        TextConfig(*_encoder(text), text.vocab_size, text.max_position_embeddings),
        stock.config.projection_dim,
        text.eos_token_id,
    )


def our_clip(stock, image_size=None):
    config = clip_config(stock)
    state = {name: tensor for name, tensor in stock.state_dict().items() if name not in CLIP_UNUSED}
    if image_size is not None:
        config = config.with_image_size(image_size)
        name = "vision_model.embeddings.position_embedding.weight"
        state[name] = interpolate_positions(state[name], config.vision.grid, prefix_tokens=1)
    model = ClipRetrieval(config)
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def clip_texts(stock, count=5, seed=0):
    """Rows that start, end at different places, and are padded with the end-of-text token; and the mask of each."""
    text = stock.config.text_config
    end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    length = text.max_position_embeddings
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, min(40, text.vocab_size - 2), (count, length), generator=generator)
    ends = torch.randint(1, length, (count,), generator=generator)
    ends[0], ends[1] = length - 1, 1
    places = torch.arange(length)
    return torch.where(places >= ends[:, None], end, ids), (places <= ends[:, None]).long()


def siglip_config(stock):
    vision, text = stock.config.vision_config, stock.config.text_config
    return SiglipConfig(
        "small",
        VisionConfig(*_encoder(vision), vision.image_size, vision.patch_size),
        TextConfig(*_encoder(text), text.vocab_size, text.max_position_embeddings),
    )


def our_siglip(stock, perturbation=None, image_size=None):
    config = siglip_config(stock)
    state = {name: tensor for name, tensor in stock.state_dict().items() if name not in SIGLIP_UNUSED}
    if image_size is not None:
        config = config.with_image_size(image_size)
        name = "vision_model.embeddings.position_embedding.weight"
        state[name] = interpolate_positions(state[name], config.vision.grid, prefix_tokens=0)
    model = SiglipRetrieval(config, perturbation)
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def siglip_texts(stock, count=5, seed=0):
    text = stock.config.text_config
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, text.vocab_size, (count, text.max_position_embeddings), generator=generator)
    lengths = torch.randint(1, text.max_position_embeddings, (count, 1), generator=generator)
    return torch.where(torch.arange(ids.shape[1]) < lengths, ids, 1)
