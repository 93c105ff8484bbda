"""Images and texts prepared by the stock tools of a Hugging Face folder, without qpert's preprocessing.

transformers 5 has a PIL and a torchvision backend for its image processors. This uses the PIL one ("slow" in
transformers 4): it needs no torchvision, and resizes with PIL, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qpert.exporter.checkpoints.hub_folder import vocabulary_in
from qpert.runtime.errors import UnavailableError
from qpert.runtime.libraries import turn_off_telemetry


def stock_pixels(folder: Path | None, size: int, kind: str) -> Callable[[Path], np.ndarray]:
    """A function from an image file to float32 [3, size, size], with the folder's own image processor.

    Args:
        folder: None, or without an image processor, uses the class `kind` with transformers' defaults.
        size: the vision tower's. If the processor's differs (`--image-size`), it is passed to the processor.
        kind: for example `BlipImageProcessor`.

    Raises:
        UnavailableError: the installed transformers cannot open it.
    """
    load_image = _transformers().image_utils.load_image

    processor = _own_processor(folder) if folder is not None and has_image_processor(folder) else None
    if processor is None:
        processor = _class(kind)(size={"height": size, "width": size})

    def pixels(file: Path) -> np.ndarray:
        picture = load_image(str(file))  # EXIF orientation applied, RGB
        found = processor(picture, return_tensors="np")["pixel_values"][0]
        if found.shape[-1] != size:
            found = processor(picture, return_tensors="np", **_size_arguments(processor, size))["pixel_values"][0]
        return np.asarray(found, np.float32)

    return pixels


def has_image_processor(folder: Path) -> bool:
    """Whether a folder has an image processor."""
    combined = folder / "processor_config.json"
    nested = combined.is_file() and '"image_processor"' in combined.read_text(encoding="utf-8")
    return nested or (folder / "preprocessor_config.json").is_file()


def _transformers() -> Any:
    turn_off_telemetry()
    import transformers
    import transformers.image_utils

    return transformers


def _own_processor(folder: Path) -> Any:
    transformers = _transformers()
    version = transformers.__version__
    backend: dict[str, Any] = {"backend": "pil"} if int(version.split(".")[0]) >= 5 else {"use_fast": False}
    try:
        return transformers.AutoImageProcessor.from_pretrained(str(folder), **backend)
    except (OSError, ValueError, ImportError) as error:
        raise UnavailableError(
            f"transformers {version} cannot open the image processor of {folder} ({error}); upgrade transformers, "
            "or use --reference torch",
            code="reference-processor",
        ) from error


def _class(kind: str) -> Any:
    """The PIL form of an image processor class: `…Pil` in transformers 5, the plain name before."""
    transformers = _transformers()
    if int(transformers.__version__.split(".")[0]) >= 5:
        return getattr(transformers, f"{kind}Pil")
    return getattr(transformers, kind)


def _size_arguments(processor: Any, size: int) -> dict[str, Any]:
    """Arguments for another image size. A crop keeps the same share of the image."""
    square = {"height": size, "width": size}
    if not getattr(processor, "do_center_crop", False):
        return {"size": square}
    own = processor.crop_size["height"], processor.size["shortest_edge"]
    return {"size": {"shortest_edge": max(size, round(own[1] * size / own[0]))}, "crop_size": square}


def stock_token_ids(folder: Path | None) -> Callable[[Sequence[str], int], list[np.ndarray]] | None:
    """A function from texts and a maximum length to ids int64 [L] each, with the folder's own tokenizer, or None.

    Raises:
        UnavailableError: the installed transformers cannot open it.
    """
    if vocabulary_in(folder) is None:
        return None
    transformers = _transformers()
    version = transformers.__version__
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise UnavailableError(
            f"transformers {version} cannot open the tokenizer of {folder} ({error}); upgrade transformers, or "
            "use --reference torch",
            code="reference-tokenizer",
        ) from error

    def token_ids(texts: Sequence[str], length: int) -> list[np.ndarray]:
        found = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
        return [np.array(ids, np.int64) for ids in found]

    return token_ids
