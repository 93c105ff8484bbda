"""Whether 8-bit products saturate on this CPU."""

from __future__ import annotations

import numpy as np

from qpert.runtime.gallery.products import by_matrix_product

SATURATION_NOTICE = (
    "this CPU adds pairs of 8-bit products in 16 bits (no VNNI), where full-range weights can saturate: results here "
    "can be worse than on a CPU with VNNI. For CPUs like this one pass --reduce-range (7-bit weights)"
)


def products_saturate() -> bool:
    """Whether ONNX Runtime's u8 × s8 products are wrong at the ends of their range on this CPU.

    Two products of 255·127 are 64,770, more than 16 bits hold with a sign: AVX2's `vpmaddubsw` cuts them off at 32,767.
    """
    pixels, weights = np.full((1, 1, 64), 255, np.uint8), np.full((64, 1), 127, np.int8)
    exact = (255 - 128) * 127 * 64  # the products' zero point is 128
    return int(by_matrix_product(pixels, weights)[0, 0]) != exact
