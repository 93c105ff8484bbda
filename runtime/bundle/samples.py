"""`samples.safetensors`: inputs and reference outputs that PyTorch recorded at export.

Each case is one graph with inputs and what PyTorch made of them. Next to the cases are a few pictures with their
preprocessed pixels and captions with their token ids, so that preprocessing and tokenisation are verified too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from qpert.runtime.errors import BundleError


@dataclass(frozen=True, eq=False)
class Case:
    """One graph on some rows. `expected` is what the reference gives for them, by output name."""

    graph: str
    name: str
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class BoxSample:
    """Boxes of one picture and what the bundle's perturbation makes of them.

    xyxy float64 [O, 4] and size int64 [2] (width, height) in pixels; masks float32 [O, N]; weights float32 [O].
    """

    xyxy: np.ndarray
    size: np.ndarray
    masks: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, eq=False)
class Samples:
    """All that was recorded: pictures uint8 [H, W, 3] with float32 [3, S, S], captions with int64 ids [L], boxes.

    `pillow_decides`: the pixels are a stock processor's, whose one call of resize leaves the order of axes to Pillow.
    """

    cases: tuple[Case, ...]
    pictures: tuple[tuple[np.ndarray, np.ndarray], ...]
    captions: tuple[tuple[str, np.ndarray], ...]
    boxes: tuple[BoxSample, ...]
    pillow_decides: bool = False

    def to_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Tensors and metadata in the form that safetensors stores."""
        arrays: dict[str, np.ndarray] = {}
        for case in self.cases:
            arrays |= {f"{case.graph}/{case.name}/in/{name}": array for name, array in case.inputs.items()}
            arrays |= {f"{case.graph}/{case.name}/out/{name}": array for name, array in case.expected.items()}
        for number, (picture, pixels) in enumerate(self.pictures):
            arrays |= {f"picture/{number}/image": picture, f"picture/{number}/pixel_values": pixels}
        for number, (_, ids) in enumerate(self.captions):
            arrays[f"caption/{number}/input_ids"] = ids
        for number, sample in enumerate(self.boxes):
            arrays |= {f"boxes/{number}/{field.name}": getattr(sample, field.name) for field in fields(BoxSample)}
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return contiguous, {"captions": json.dumps([caption for caption, _ in self.captions])}

    @classmethod
    def load(cls, path: Path, graphs: Sequence[str]) -> Samples:
        """Cases in the order of `graphs` (names). Raises BundleError where the file is not what an export writes."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as stored:
                arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, not a mapping
                captions = json.loads((stored.metadata() or {})["captions"])
            cases = _cases(arrays, graphs)
            ordered = sorted(cases, key=lambda case: (list(graphs).index(case.graph), case.name))
            return cls(tuple(ordered), _pictures(arrays), _captions(arrays, captions), _boxes(arrays))
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
            raise BundleError(
                f"{path} cannot be read as recorded samples ({error}); export the bundle again",
                code="samples-unreadable",
            ) from error


def _cases(arrays: dict[str, np.ndarray], graphs: Sequence[str]) -> tuple[Case, ...]:
    found: dict[tuple[str, str], Case] = {}
    for key, array in sorted(arrays.items()):
        graph, case, *rest = key.split("/")
        if graph in graphs:
            entry = found.setdefault((graph, case), Case(graph, case, {}, {}))
            (entry.inputs if rest[0] == "in" else entry.expected)[rest[1]] = array
    return tuple(found.values())


def _pictures(arrays: dict[str, np.ndarray]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    names = sorted(key.removesuffix("/image") for key in arrays if key.endswith("/image"))
    return tuple((arrays[f"{name}/image"], arrays[f"{name}/pixel_values"]) for name in names)


def _captions(arrays: dict[str, np.ndarray], captions: list[str]) -> tuple[tuple[str, np.ndarray], ...]:
    return tuple((caption, arrays[f"caption/{number}/input_ids"]) for number, caption in enumerate(captions))


def _boxes(arrays: dict[str, np.ndarray]) -> tuple[BoxSample, ...]:
    names = sorted(key.removesuffix("/xyxy") for key in arrays if key.endswith("/xyxy"))
    return tuple(
        BoxSample(**{field.name: arrays[f"{name}/{field.name}"] for field in fields(BoxSample)}) for name in names
    )
