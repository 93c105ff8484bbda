"""Files of open_clip, which the CLIP family does not read: their kind is named, with what to do."""

from __future__ import annotations

from pathlib import Path

from qpert.exporter.checkpoints.files import open_tensors
from qpert.exporter.checkpoints.json_files import read_json_object
from qpert.exporter.checkpoints.state_dicts import without_prefixes
from qpert.runtime.errors import CheckpointError

CONFIG_NAME = "open_clip_config.json"
CONVERT = "`qpert export clip` takes CLIP in Hugging Face's form: pass such a folder, or its hub id"
USE_COCA = "export it with `qpert export coca`"


def refuse_open_clip(source: str) -> None:
    """Raise for a folder or file of open_clip.

    Raises:
        CheckpointError: `clip-open-clip`, naming the key that tells, or the file cannot be read.
    """
    path = Path(source).expanduser()
    if (path / CONFIG_NAME).is_file() and not (path / "config.json").is_file():
        model = read_json_object(path / CONFIG_NAME).get("model_cfg")
        is_coca = isinstance(model, dict) and "multimodal_cfg" in model
        told = f"{path / CONFIG_NAME} has {'model_cfg.multimodal_cfg' if is_coca else 'model_cfg'}"
    elif path.is_file():
        store = without_prefixes(open_tensors(path))
        names = sorted(store.entries)
        store.close()
        signs = [name for name in names if name == "text.cls_emb" or name.startswith("visual.attn_pool.")]
        is_coca = bool(signs)
        signs += [name for name in names if name in ("visual.conv1.weight", "visual.class_embedding")]
        if not signs:
            return  # another kind of file: the usual message
        told = f"{path} has {signs[0]}"
    else:
        return
    what = "a CoCa" if is_coca else "a CLIP"
    raise CheckpointError(
        f"{told}: it is {what} of open_clip; {USE_COCA if is_coca else CONVERT}", code="clip-open-clip"
    )
