"""The key bias of cross-attention, which stock scores do not depend on and key subspaces do.

Softmax does not see what is added to all logits of a query. A key bias b adds q·b to all of them, so stock attention
is the same for every b, and no loss has a gradient in it. The perturbation is not: the subspace of a box is spanned
by its keys, bias included, and q'·k = q·k + w (q P)·k. With b = −W_k μ, where μ is the mean token of what shows no
object, keys of the background are about zero; the leading direction of a box then is what sets its tokens apart, and
q·k on it is positive where the query looks for objects.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scoring import token_grid
from torch import Tensor

from qpert.graphs.families.blip2.model import Blip2Retrieval
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.perturbation import object_masks


def background_mean(image_embeds: Tensor, boxes: Sequence[Boxes]) -> Tensor:
    """float32 [C]: the mean patch token outside all boxes, of image_embeds [B, N, C]."""
    covered = torch.from_numpy(object_masks(boxes, grid=token_grid(), coverage="exact")).amax(1)  # [B, N]
    outside = covered == 0
    outside[:, 0] = False  # CLS
    return image_embeds[outside].mean(0)


def set_key_centre(model: Blip2Retrieval, centre: Tensor | None) -> None:
    """Set each cross-attention's key bias to −W_k · centre, or to 0: a token like `centre` then has a key of zero."""
    with torch.no_grad():
        for cross in model.Qformer.cross_attentions:
            bias = torch.zeros_like(cross.self.key.bias) if centre is None else -(cross.self.key.weight @ centre)
            cross.self.key.bias.copy_(bias)
