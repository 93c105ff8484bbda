"""A full-size checkpoint with exactly the names, shapes and dtypes of LAVIS's `blip2_finetune_coco.pth`, on disk."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from qpert.exporter.families.blip2.checkpoint import open_checkpoint
from qpert.graphs.families.blip2.config import CONFIGS
from qpert.graphs.families.blip2.model import Blip2Retrieval

pytestmark = pytest.mark.slow

FIXTURE = Path(__file__).parents[2] / "fixtures" / "keys" / "lavis_coco.json"
BYTES = {"F32": 4, "I64": 8}
NEEDED = 6 << 30


def write_sparse(path: Path, random: dict[str, np.ndarray]) -> None:
    """A safetensors file of 4.8 GB with holes: the tensors in `random` hold numbers, the others take no disk."""
    header, offset = {}, 0
    for name, entry in json.loads(FIXTURE.read_text())["files"]["checkpoint"].items():
        dtype, _, shape = entry.partition(" ")
        lengths = [int(length) for length in shape.split("x")] if shape else []
        size = BYTES[dtype] * math.prod(lengths)
        header[name] = {"dtype": dtype, "shape": lengths, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        start = stream.tell()
        for name, values in random.items():
            stream.seek(start + header[name]["data_offsets"][0])
            stream.write(values.tobytes())
        stream.truncate(start + offset)


def test_a_full_size_checkpoint_opens_with_every_real_name(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < NEEDED:
        pytest.skip("needs a disk with 6 GB free, in case it does not keep holes")
    rng = np.random.default_rng(0)
    random = {
        "query_tokens": rng.standard_normal((1, 32, 768), dtype=np.float32),
        "visual_encoder.blocks.38.attn.qkv.weight": rng.standard_normal((4224, 1408), dtype=np.float32),
        "Qformer.bert.encoder.layer.10.crossattention.self.key.weight": rng.standard_normal((768, 1408), np.float32),
    }
    path = tmp_path / "coco.safetensors"
    write_sparse(path, random)
    with torch.device("meta"):
        needed = {name: tensor.shape for name, tensor in Blip2Retrieval(CONFIGS["coco"]).state_dict().items()}
    with open_checkpoint(str(path)) as checkpoint:
        assert checkpoint.config.vision == CONFIGS["coco"].vision
        assert checkpoint.config.qformer == CONFIGS["coco"].qformer
        assert set(checkpoint.tensors.names()) == set(needed)
        for name, values in random.items():
            np.testing.assert_array_equal(checkpoint.tensors.get(name).numpy(), values)
            assert checkpoint.tensors.get(name).shape == needed[name]
