"""Keys with chosen spectra: the battery that any lowering of the query map must pass.

Every generator takes (rng, count, head_dim) and gives float32 keys [count, N, d]; the count becomes layers × heads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Generator = Callable[[np.random.Generator, int, int], np.ndarray]


def with_spectrum(rng: np.random.Generator, eigenvalues: np.ndarray, tokens: int) -> np.ndarray:
    """Keys [count, tokens, d] whose Gram matrices have these eigenvalues [count, d] and random eigenvectors."""
    count, d = eigenvalues.shape
    left, _ = np.linalg.qr(rng.standard_normal((count, max(tokens, d), d)))
    right, _ = np.linalg.qr(rng.standard_normal((count, d, d)))
    return (left * np.sqrt(eigenvalues)[:, None, :] @ right.transpose(0, 2, 1)).astype(np.float32)


def power_law(rng: np.random.Generator, count: int, d: int, tokens: int = 96, exponent: float = 1.5) -> np.ndarray:
    """Gaussian keys whose directions have standard deviations falling as a power of their index, all around a mean."""
    scale = np.arange(1, d + 1) ** (-exponent / 2)
    rotation, _ = np.linalg.qr(rng.standard_normal((count, d, d)))
    keys = rng.standard_normal((count, tokens, d)) * scale @ rotation
    return (keys + 0.5 * rng.standard_normal((count, 1, d))).astype(np.float32)


def one_key(rng: np.random.Generator, count: int, d: int) -> np.ndarray:
    keys = np.zeros((count, 5, d), np.float32)
    keys[:, 2] = rng.standard_normal((count, d))
    return keys


def all_keys_equal(rng: np.random.Generator, count: int, d: int) -> np.ndarray:
    return np.repeat(rng.standard_normal((count, 1, d)).astype(np.float32), 40, axis=1)


def low_rank(rng: np.random.Generator, count: int, d: int) -> np.ndarray:
    """Three keys: every cut lies within a rank of three."""
    return rng.standard_normal((count, 3, d)).astype(np.float32)


def flat(rng: np.random.Generator, count: int, d: int) -> np.ndarray:
    """Isotropic Gaussian keys, many of them: eigenvalues within a factor of four, the cut in their midst."""
    return rng.standard_normal((count, 12 * d, d)).astype(np.float32)


def nearly_equal_eigenvalues(rng: np.random.Generator, count: int, d: int) -> np.ndarray:
    """Eigenvalues that differ by about a thousandth from each to the next."""
    return with_spectrum(rng, 1 + 1e-3 * rng.uniform(0.5, 1.5, (count, d)).cumsum(-1), 2 * d)


def steep(rng: np.random.Generator, count: int, d: int) -> np.ndarray:
    """Eigenvalues that fall geometrically by 10⁶ over the head dimension."""
    exponents = np.sort(rng.uniform(-6, 0, (count, d)), axis=-1)
    exponents[:, 0], exponents[:, -1] = -6, 0
    return with_spectrum(rng, 10**exponents, 2 * d)


def dominant_mean(rng: np.random.Generator, count: int, d: int) -> np.ndarray:
    """A common mean many times as long as the spread about it, as real keys have."""
    mean = rng.standard_normal((count, 1, d)) * rng.uniform(1, 5, (count, 1, 1))
    return (power_law(rng, count, d, 200) + mean).astype(np.float32)


def duplicates_away_from_the_cut(rng: np.random.Generator, count: int, d: int) -> np.ndarray:
    """Eigenvalues in equal groups of four, each group a quarter below the one before; cuts inside a group are ties."""
    return with_spectrum(rng, np.repeat(0.55 ** np.arange(d // 4), 4)[None] * np.ones((count, 1)), 2 * d)


def ratio_near(
    rng: np.random.Generator, count: int, d: int, threshold: float, *, rank: int, least: float = 3e-5
) -> np.ndarray:
    """Low rank, as of a box over few tokens, with one cumulative ratio `least` to 1e-3 from the threshold on either
    side, and eigenvalues a tenth of each other apart or more."""
    steps = 0.8 ** np.arange(rank) * rng.uniform(0.95, 1.05, (count, rank))
    lead = np.arange(rank) < rng.integers(1, rank, (count, 1))
    ratio = threshold + np.exp(rng.uniform(np.log(least), np.log(1e-3), (count, 1))) * rng.choice([-1, 1], (count, 1))
    share = np.where(
        lead, ratio / (steps * lead).sum(-1, keepdims=True), (1 - ratio) / (steps * ~lead).sum(-1, keepdims=True)
    )
    return with_spectrum(rng, np.pad(steps * share, ((0, 0), (0, d - rank))), 2 * d)


def close_pairs(rng: np.random.Generator, count: int, d: int) -> np.ndarray:
    """Falling eigenvalues in pairs that lie 10⁻⁵ to 10⁻² of the greatest apart: small gaps at many cuts."""
    level = 0.93 ** np.arange(d // 2) * rng.uniform(0.97, 1.0, (count, d // 2))
    apart = np.minimum(10 ** rng.uniform(-5, -2, level.shape), level / 2)
    return with_spectrum(rng, np.stack([level, level - apart], axis=-1).reshape(count, d), 2 * d)


def identical_eigenvalues(rng: np.random.Generator, count: int, d: int) -> np.ndarray:
    """C is a multiple of I: every cut is a tie, only sanity can be asked."""
    return with_spectrum(rng, np.ones((count, d)), 2 * d)


def single_token(rng: np.random.Generator, count: int, d: int) -> np.ndarray:
    return rng.standard_normal((count, 1, d)).astype(np.float32)


def tiny(rng: np.random.Generator, count: int, d: int) -> np.ndarray:
    return (power_law(rng, count, d) * 1e-4).astype(np.float32)


def huge(rng: np.random.Generator, count: int, d: int) -> np.ndarray:
    return (power_law(rng, count, d) * 1e4).astype(np.float32)


def patch_tokens(rng: np.random.Generator, count: int, d: int) -> np.ndarray:
    """As many tokens as ViT-g has at 364 pixels, the first (CLS) unlike the others."""
    keys = power_law(rng, count, d, 677, 1.0)
    keys[:, 0] *= 4
    return keys


SPECTRA: dict[str, Generator] = {
    "one key": one_key,
    "all keys equal": all_keys_equal,
    "rank three": low_rank,
    "power law": power_law,
    "flat": flat,
    "nearly equal eigenvalues": nearly_equal_eigenvalues,
    "steep, falling by a million": steep,
    "dominant mean direction": dominant_mean,
    "duplicated eigenvalues": duplicates_away_from_the_cut,
    "single token": single_token,
    "677 tokens": patch_tokens,
    "scale 1e-4": tiny,
    "scale 1e4": huge,
}
