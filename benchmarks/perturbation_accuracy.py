"""How exact the perturbation's subgraph is: the projectors of many key spectra, against float64 `torch.linalg.eigh`.

    python benchmarks/perturbation_accuracy.py --out benchmarks/results/perturbation_accuracy.json
    python benchmarks/perturbation_accuracy.py --heads wide --count 60 \
        --out benchmarks/results/perturbation_accuracy_wide_heads.json

The spectra are those of the tests (`tests/spectra.py`), many more of them. Asked for are the cuts that float32 can
decide: |c − τ| > 1e-5, and a gap above 1e-5 λ_1. Beside it stands what an exact eigendecomposition makes of the same
float32 Gram matrices: no method that starts from them can do better.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from qpert.graphs.perturbation.oracle import KeySubspaces, key_subspaces

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))
from lowered import lowered_model  # noqa: E402
from spectra import SPECTRA, Generator, close_pairs, ratio_near  # noqa: E402

ADMITTED = 1e-5
GREATEST_ERROR = 1e-3
SETTINGS = {
    "usual": ((64, 0.85), (64, 0.9), (64, 0.95), (64, 0.99), (32, 0.95), (16, 0.9), (16, 0.99)),
    "wide": ((96, 0.9), (96, 0.95), (96, 0.99), (128, 0.9), (128, 0.95), (128, 0.99), (200, 0.9), (200, 0.95)),
}
"""Head dimension d and threshold τ. Usual: BLIP-2's heads of 64, and smaller ones; wide: those of CoCa L/14 (96) and
of InternVL (128, 200)."""
NEAR = {"usual": (16, 64), "wide": (96, 128, 200)}
"""Head dimensions of the ratios close to the threshold."""
RANKS = (2, 3, 5)
SETS = ("battery", "close pairs", "ratios close to the threshold")

Floats = npt.NDArray[np.float64]
Cases = Iterator[tuple[npt.NDArray[np.float32], float]]


def session(head_dimension: int, threshold: float) -> onnxruntime.InferenceSession:
    """The subgraph alone, in ONNX Runtime on the CPU."""
    model = lowered_model(head_dimension, threshold)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def lowered(run: onnxruntime.InferenceSession, keys: npt.NDArray[np.float32]) -> Floats:
    """P of each of [count, N, d] under one box over everything: M − I with weight 1."""
    masks, weights = np.ones((1, 1, keys.shape[1]), np.float32), np.ones((1, 1), np.float32)
    feed = {"keys": keys[None, None], "object_masks": masks, "box_weights": weights}
    return run.run(None, feed)[0][0, 0].astype(np.float64) - np.eye(keys.shape[-1])


def from_single(keys: npt.NDArray[np.float32], threshold: float) -> Floats:
    """The same from the float32 Gram matrices by an exact eigendecomposition in float64."""
    values, vectors = np.linalg.eigh((keys.swapaxes(-1, -2) @ keys).astype(np.float64))
    values, vectors = values[:, ::-1].clip(0), vectors[..., ::-1]
    ranks = np.maximum(1, (values.cumsum(-1) < threshold * values.sum(-1, keepdims=True)).sum(-1))
    leading = vectors * (np.arange(keys.shape[-1]) < ranks[:, None])[:, None]
    return leading @ leading.swapaxes(-1, -2)


def errors(found: Floats, expected: KeySubspaces) -> Floats:
    """‖P − P_oracle‖_F of the admitted; infinite where the rank is wrong."""
    margins, gaps, ranks = (x[0, 0, 0].numpy() for x in (expected.margins, expected.gaps, expected.ranks))
    distance = np.linalg.norm(found - expected.projectors[0, 0, 0].numpy(), axis=(-2, -1))
    wrong = np.trace(found, axis1=-2, axis2=-1).round() != ranks
    return np.where(wrong, np.inf, distance)[(margins > ADMITTED) & (gaps > ADMITTED)]


def cases_of(name: str, heads: str, count: int, seed: list[int]) -> Cases:
    """Keys [count, N, d] and τ of one of `SETS`."""
    if name == "battery":
        return cases(SPECTRA, heads, count, seed)
    if name == "close pairs":
        return cases({name: close_pairs}, heads, count, seed)
    return near_the_threshold(heads, 5 * count, seed)


def near_the_threshold(heads: str, count: int, seed: list[int]) -> Cases:
    for rank in RANKS:
        for head_dimension in NEAR[heads]:
            rng = np.random.default_rng([5, rank, head_dimension, *seed])
            yield ratio_near(rng, count, head_dimension, 0.95, rank=rank), 0.95


def cases(generators: dict[str, Generator], heads: str, count: int, seed: list[int]) -> Cases:
    for number, generate in enumerate(generators.values()):
        for setting, (head_dimension, threshold) in enumerate(SETTINGS[heads]):
            rng = np.random.default_rng([12, number, setting, *seed])
            yield generate(rng, count, head_dimension), threshold


def summary(found: Floats) -> dict[str, Any]:
    quantiles = {f"{q:g}": float(f"{np.quantile(found, q):.2g}") for q in (0.5, 0.9, 0.99, 0.999)}
    return {
        "admitted": len(found),
        "wrong_rank": int(np.isinf(found).sum()),
        "error_above_1e-3": int((np.isfinite(found) & (found > GREATEST_ERROR)).sum()),
        "error_quantiles": quantiles,
    }


def measure(name: str, heads: str, count: int, seed: list[int]) -> dict[str, Any]:
    ours, exact, unsettled, matrices = [], [], 0, 0
    near = ((head_dimension, 0.95) for head_dimension in NEAR[heads])
    sessions = {setting: session(*setting) for setting in (*SETTINGS[heads], *near)}
    for keys, threshold in cases_of(name, heads, count, seed):
        expected = key_subspaces(
            torch.from_numpy(keys)[None, None], torch.ones(1, 1, keys.shape[1]), threshold=threshold
        )
        found = lowered(sessions[keys.shape[-1], threshold], keys)
        ours.append(errors(found, expected))
        exact.append(errors(from_single(keys, threshold), expected))
        unsettled += int((np.abs(found @ found - found).max(axis=(-2, -1)) > 1e-4).sum())
        matrices += len(keys)
    single = summary(np.concatenate(exact))
    return {"matrices": matrices, "not_idempotent_to_1e-4": unsettled} | {
        "lowering": summary(np.concatenate(ours)),
        "eigh_of_float32_gram": single,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--count", type=int, default=300, help="matrices of each spectrum, head dimension and threshold"
    )
    parser.add_argument("--heads", choices=list(SETTINGS), default="usual", help="which head dimensions")
    parser.add_argument("--seed", type=int, nargs="*", default=[], help="draws others of the same kinds")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    options = parser.parse_args()
    report = {name: measure(name, options.heads, options.count, options.seed) for name in SETS}
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
