"""State dicts as training tools wrap them: under a key, every name with a prefix. What was taken off is noted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qpert.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from qpert.exporter.checkpoints.files import TensorStore

LAVIS_KEY = "model"
WEIGHT_KEYS = (LAVIS_KEY, "state_dict", "model_state_dict", "module")
"""Where weights are: LAVIS, Lightning and MoCo, the PyTorch tutorial, DeepSpeed. The first of them counts."""
AVERAGE_KEYS = ("model_ema", "ema", "ema_state_dict", "state_dict_ema")
"""Where averaged weights are; taken where a file has nothing else."""

PREFIXES = ("module.", "model.", "_orig_mod.")
"""What DistributedDataParallel, Lightning and torch.compile put before every name."""


def state_dict_of(loaded: Any, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict in what `torch.load` returned, and notes on where it was.

    Raises:
        CheckpointError: there is none, or entries that are no tensors beside its tensors.
    """
    state: Any = loaded
    notes: tuple[str, ...] = ()
    if isinstance(loaded, Mapping):
        found = [key for key in (*WEIGHT_KEYS, *AVERAGE_KEYS) if isinstance(loaded.get(key), Mapping)]
        if found:
            state, notes = loaded[found[0]], _container_notes(path, found)
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__}; expected a state dict (tensors by name), alone or under {_keys()}",
            code="state-dict-missing",
        )
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        more = f", and {len(others) - 10} more" if len(others) > 10 else ""
        got = f"entries that are no tensors: {', '.join(others[:10])}{more}" if others else "nothing"
        raise CheckpointError(
            f"{path} holds {got}; expected a state dict, alone or under {_keys()}", code="state-dict-missing"
        )
    return {str(name): value for name, value in state.items()}, notes


def _keys() -> str:
    return ", ".join(repr(key) for key in (*WEIGHT_KEYS, *AVERAGE_KEYS))


def _container_notes(path: Path, found: list[str]) -> tuple[str, ...]:
    taken, *others = found
    if taken == LAVIS_KEY and not others:
        return ()
    average = " (an average of the weights: the file has no others)" if taken in AVERAGE_KEYS else ""
    beside = f"; {', '.join(map(repr, others))} beside it not used" if others else ""
    return (f"{path.name}: the weights are those under {taken!r}{average}{beside}",)


def without_prefixes(store: TensorStore) -> TensorStore:
    """The store without `PREFIXES` that every name begins with, noted.

    Only what all names share is taken off, so that two tensors never get one name.
    """
    taken = ""
    names = list(store.entries)
    while prefix := next((one for one in PREFIXES if names and all(name.startswith(one) for name in names)), None):
        names, taken = [name.removeprefix(prefix) for name in names], taken + prefix
    if not taken:
        return store
    note = f"all {len(names)} names of tensors begin with {taken!r}, which was taken off"
    entries = {name.removeprefix(taken): info for name, info in store.entries.items()}
    return replace(
        store, entries=entries, read=lambda name: store.read(taken + name), notes=(*store.notes, note), prefix=taken
    )
