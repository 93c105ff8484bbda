"""State dicts as training tools wrap them: under a key, with a prefix on every name. Notes state what was removed."""

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
"""Keys of the weights in files of LAVIS, Lightning and MoCo, the PyTorch tutorial, DeepSpeed. The first one wins."""
AVERAGE_KEYS = ("model_ema", "ema", "ema_state_dict", "state_dict_ema")
"""Keys of averaged weights, used if a file has no others."""

PREFIXES = ("module.", "model.", "_orig_mod.")
"""Prefixes that DistributedDataParallel, Lightning and torch.compile add to every name."""


def state_dict_of(loaded: Any, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict in the result of `torch.load`, and notes on where it was.

    Raises:
        CheckpointError: there is none, or it has entries that are not tensors.
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
        got = f"entries that are not tensors: {', '.join(others[:10])}{more}" if others else "nothing"
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
    unused = f"; not used: {', '.join(map(repr, others))}" if others else ""
    return (f"{path.name}: the weights are under {taken!r}{average}{unused}",)


def without_prefixes(store: TensorStore) -> TensorStore:
    """The store without the `PREFIXES` that all names share, with a note.

    Only a prefix of all names is removed, so two tensors never get the same name.
    """
    taken = ""
    names = list(store.entries)
    while prefix := next((one for one in PREFIXES if names and all(name.startswith(one) for name in names)), None):
        names, taken = [name.removeprefix(prefix) for name in names], taken + prefix
    if not taken:
        return store
    note = f"all {len(names)} tensor names begin with {taken!r}, which was removed"
    entries = {name.removeprefix(taken): info for name, info in store.entries.items()}
    return replace(
        store, entries=entries, read=lambda name: store.read(taken + name), notes=(*store.notes, note), prefix=taken
    )
