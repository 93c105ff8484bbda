"""Write what the shipped detector finds in a split of the demonstration, as a box file for `qpert index --boxes`.

    python examples/demonstration_detector/boxes.py --split test --out boxes.jsonl

With stock transformers, to compare with `qpert detect`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from average_precision import FOLDER, SEED, as_written, detect, kept
from detector_data import LABELS
from evaluate import MOST, OVERLAP, THRESHOLD
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from qpert.runtime.files import write_atomically
from qpert.runtime.progress import Progress, Terminal
from qpert.runtime.scenes import SPLIT_SIZES, generate
from qpert.runtime.scenes.writer import TREES


def box_lines(folder: Path, split: str, count: int, progress: Progress) -> list[str]:
    """A JSON object for each box; images are named as in the Flickr30k layout of the generated data set."""
    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    tree, lines = TREES["flickr30k"], []
    with progress.stage(f"detecting on {count} scenes ({split})", count) as advance:
        for index, (scene, _) in enumerate(generate(split, count, SEED)):
            picture = as_written(scene)
            (found,) = detect(model, processor, [picture], THRESHOLD)
            found = kept(found, threshold=THRESHOLD, overlap=OVERLAP, most=MOST)
            corners = found.boxes.clip(0, [picture.width, picture.height] * 2).round(2)  # some reach beyond the picture
            seen = (corners[:, 2:] > corners[:, :2]).all(1)
            found, corners = found[seen], corners[seen].tolist()
            for box, score, label in zip(corners, found.scores.tolist(), found.labels.tolist(), strict=True):
                place = dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))
                name = f"{tree.images}/{tree.file(split, index)}"
                lines.append(json.dumps({"image": name, **place, "score": round(score, 4), "label": LABELS[label]}))
            advance(1)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--count", type=int, help="scenes; all of the split unless given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = box_lines(options.folder, options.split, options.count or SPLIT_SIZES[options.split], Terminal())
    write_atomically(options.out, "".join(f"{line}\n" for line in lines))
    print(f"{options.out}: {len(lines)} boxes")


if __name__ == "__main__":
    main()
