"""Files of tensors behind one interface: names and shapes are known on opening, values are read one tensor at a time.

Nothing here runs code from a file: `torch.load` is always `weights_only=True`, and safetensors holds no code.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpert.exporter.checkpoints.download import Progress
from qpert.exporter.checkpoints.state_dicts import state_dict_of
from qpert.runtime.errors import CheckpointError
from qpert.runtime.files import CHUNK

SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
DOWNLOAD_AGAIN = "download or copy it again"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's shape and dtype, known before it is read. `dtype` is torch's name, without `torch.`."""

    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class TensorStore:
    """Tensors of one or more files. `read` returns a tensor as stored; `close` releases the files.

    `prefix`: removed from every name in the files.
    """

    entries: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]
    close: Callable[[], None]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    prefix: str = ""


def open_tensors(path: Path) -> TensorStore:
    """Open a `.safetensors` file, or else a file of `torch.save`.

    Raises:
        CheckpointError: missing, empty, truncated, corrupt, containing code, or not a checkpoint at all.
    """
    check_readable(path)
    return open_safetensors(path) if path.suffix == ".safetensors" else open_torch(path)


def check_readable(path: Path) -> None:
    """Raise `CheckpointError` for faults visible without parsing: missing, empty, or clearly not a checkpoint."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a checkpoint file", code="checkpoint-not-found")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; expected a checkpoint file", code="checkpoint-unreadable")
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); check its permissions", code="checkpoint-unreadable"
        ) from error
    if not head:
        raise CheckpointError(f"{path} is empty; expected a checkpoint: {DOWNLOAD_AGAIN}", code="checkpoint-empty")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder",
            code="git-lfs-pointer",
        )
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(
            f"{path} is a web page, not a checkpoint (a failed download?); {DOWNLOAD_AGAIN}", code="checkpoint-web-page"
        )


def open_torch(path: Path) -> TensorStore:
    """A file of `torch.save`: a state dict, alone or wrapped (`state_dicts`). Memory-mapped if it is a zip archive.

    Files from before torch 1.6 are not, and are read into memory, with a note.
    """
    zipped = zipfile.is_zipfile(path)
    if not zipped and _starts_as_zip(path):
        raise CheckpointError(
            f"{path} is truncated: it starts like a checkpoint but its end is missing "
            f"({path.stat().st_size:,} bytes, half-downloaded?); {DOWNLOAD_AGAIN}",
            code="checkpoint-truncated",
        )
    if zipped:
        check_zip(path)
    state, notes = state_dict_of(_torch_load(path, mmap=zipped), path)
    entries = {name: TensorInfo(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in state.items()}
    note = f"{path.name} has the format before torch 1.6, which cannot be memory-mapped: all of it is held in memory"
    return TensorStore(entries, state.__getitem__, state.clear, (path,), notes if zipped else (*notes, note))


def _starts_as_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def check_zip(path: Path) -> None:
    """Raise `CheckpointError` for a program or a wrong checksum, which memory-mapping would not detect."""
    try:
        with zipfile.ZipFile(path) as archive:
            program = any(name.endswith("/constants.pkl") for name in archive.namelist())
            broken = None if program else archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path} is corrupt ({error}); {DOWNLOAD_AGAIN}", code="checkpoint-corrupt") from error
    if program:
        raise CheckpointError(
            f"{path} is a TorchScript program; expected a state dict, as torch.save(model.state_dict(), …) writes it",
            code="checkpoint-program",
        )
    if broken is not None:
        raise CheckpointError(
            f"{path} is corrupt: the checksum of its record {broken} is wrong; {DOWNLOAD_AGAIN}",
            code="checkpoint-corrupt",
        )


def _torch_load(path: Path, *, mmap: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle may raise anything
        raise _load_failure(path, error) from error


def _load_failure(path: Path, error: Exception) -> CheckpointError:
    if found := re.search(r"(?:Unsupported global: GLOBAL|Unsupported class|GLOBAL) (\S+)", str(error)):
        return CheckpointError(
            f"{path} holds pickled code ({found[1]}), which is never run; expected tensors only: if you trust the "
            "file, load it yourself and save its state dict with safetensors.torch.save_file",
            code="checkpoint-code",
        )
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return CheckpointError(
        f"{path} is corrupt, truncated or not a checkpoint (torch.load: {reason}); {DOWNLOAD_AGAIN}",
        code="checkpoint-corrupt",
    )


def open_safetensors(*paths: Path) -> TensorStore:
    """One safetensors file, or the shards of one checkpoint. Only the headers are read here."""
    from safetensors import SafetensorError, safe_open

    handles: dict[str, Any] = {}
    entries: dict[str, TensorInfo] = {}
    for path in paths:
        check_readable(path)
        try:
            handle: Any = safe_open(str(path), framework="pt", device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is truncated, corrupt or not a safetensors file ({error}); {DOWNLOAD_AGAIN}",
                code="checkpoint-corrupt",
            ) from error
        for name in handle.keys():  # noqa: SIM118 (a handle is not a dict)
            view = handle.get_slice(name)
            dtype = str(view.get_dtype())
            entries[name] = TensorInfo(tuple(view.get_shape()), SAFETENSORS_DTYPES.get(dtype, dtype))
            handles[name] = handle
    return TensorStore(entries, lambda name: handles[name].get_tensor(name), handles.clear, paths)


def open_folder(folder: Path) -> TensorStore:
    """The weights of a Hugging Face folder: safetensors, single or sharded, else `pytorch_model.bin` without code.

    The order is transformers' (`modeling_utils._get_resolved_checkpoint_files`): a single file wins over an index.

    Raises:
        CheckpointError: there are no weights, a shard is missing or disagrees with the index, or a file is bad.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        paths = [single] if single.is_file() else shard_paths(index) if index.is_file() else []
        if paths:
            store = open_safetensors(*paths) if suffix == "safetensors" else _open_pickles(paths)
            return replace(store, notes=(*store.notes, *_unused_weights(folder, paths)))
    raise CheckpointError(
        f"the folder {folder} holds no weights: expected model.safetensors, or model.safetensors.index.json and its "
        f"shards; it has {shorten(sorted(path.name for path in folder.iterdir())) or 'nothing'}",
        code="weights-missing",
    )


def _unused_weights(folder: Path, used: list[Path]) -> tuple[str, ...]:
    """A note on other weights in the folder, which transformers does not use either."""
    patterns = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*")
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    index = {path for path in found if path.name.endswith(".index.json")} if len(used) > 1 else set()
    left = sorted(path.name for path in found - set(used) - index)
    names = ", ".join(path.name for path in used[:2]) + (", …" if len(used) > 2 else "")
    return (f"the weights come from {names}; not used, as in transformers: {shorten(left)}",) if left else ()


def shard_paths(index: Path) -> list[Path]:
    """The shards that an index names. All must be in its folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{index} is not an index of shards ({error!r}); {DOWNLOAD_AGAIN}", code="shard-index"
        ) from error
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(
            f"{index} names {outside[0]!r}; expected files in the same folder: do not trust this checkpoint",
            code="shard-outside",
        )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of the {len(names)} shards that {index.name} names: "
            f"{shorten(missing)}; finish the download",
            code="shard-missing",
        )
    return [index.parent / name for name in names]


def _open_pickles(paths: list[Path]) -> TensorStore:
    """`pytorch_model*.bin`: accepted if they hold only tensors."""
    try:
        return merge(*(open_torch(path) for path in paths))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. Hugging Face .bin files are pickles: convert them with "
            "model.save_pretrained(folder, safe_serialization=True) and pass that folder",
            code=error.code,
        ) from error


def merge(*stores: TensorStore) -> TensorStore:
    """Several stores as one. A name may occur in only one of them."""
    owners: dict[str, TensorStore] = {}
    for store in stores:
        if twice := sorted(owners.keys() & store.entries.keys()):
            files = ", ".join(str(path) for path in (*owners[twice[0]].files, *store.files))
            raise CheckpointError(
                f"{len(twice)} tensors are in two files ({files}): {shorten(twice)}; pass one", code="tensors-twice"
            )
        owners |= dict.fromkeys(store.entries, store)

    def close() -> None:
        for store in stores:
            store.close()

    return TensorStore(
        {name: owner.entries[name] for name, owner in owners.items()},
        lambda name: owners[name].read(name),
        close,
        tuple(path for store in stores for path in store.files),
        tuple(note for store in stores for note in store.notes),
    )


def with_prefix(store: TensorStore, prefix: str) -> TensorStore:
    """The same tensors, with `prefix` added to every name."""
    entries = {prefix + name: info for name, info in store.entries.items()}
    return replace(store, entries=entries, read=lambda name: store.read(name.removeprefix(prefix)))


def foreign_extras(names: Iterable[str], parts: Collection[str]) -> list[str]:
    """Tensors that belong to no part of the network, such as a `logit_scale`. Stock models do not use them either.

    `parts`: the first components of the network's names. A tensor outside them cannot change the results; an unexpected
    one inside a part (an adapter of a layer, for example) would.
    """
    return sorted(name for name in names if name.partition(".")[0] not in parts)


def shorten(names: list[str], limit: int = 10) -> str:
    """Up to `limit` names, and the number of further ones."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def hash_files(paths: tuple[Path, ...], progress: Progress) -> str:
    """SHA-256 of the files' bytes, concatenated in the order of their names."""
    digest, done = hashlib.sha256(), 0
    total = sum(path.stat().st_size for path in paths)
    for path in sorted(paths, key=lambda path: path.name):
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                done += len(chunk)
                progress("hashing the checkpoint", done, total)
    return digest.hexdigest()


def extra_notes(extras: list[str]) -> tuple[str, ...]:
    """A note on tensors that belong to no part of the network."""
    if not extras:
        return ()
    count = f"{len(extras)} tensor{'s' if len(extras) > 1 else ''} of the checkpoint"
    return (f"{count} not used, because no part of the network has such a name: {shorten(extras)}",)
