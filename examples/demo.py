"""`make demo`: export the demonstration checkpoint, verify it against PyTorch, index photographs, search them.

Writes `demo/` in the working folder: the bundle, and `index.html` with the pictures, their boxes, and where each lands
with and without the perturbation. Needs no network and no GPU.
"""

from __future__ import annotations

import base64
import html
import io
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qpert.runtime import Boxes, Gallery, Hit, Retriever
from qpert.runtime.box_files import read_box_file
from qpert.runtime.cli import run

PHOTOS = Path(__file__).with_name("photos")
OUT = Path("demo")


@dataclass(frozen=True)
class Search:
    """One caption's results, best first, without and with boxes."""

    caption: str
    stock: list[Hit]
    perturbed: list[Hit]


def main() -> int:
    started = time.perf_counter()
    bundle = OUT / "bundle"
    shutil.rmtree(OUT, ignore_errors=True)
    for command in (["export", "blip2", "--out", str(bundle)], ["verify", str(bundle)]):
        code = run(command)
        if code:
            return code
    pictures = sorted(path for path in PHOTOS.iterdir() if path.suffix in (".jpg", ".png"))
    boxes = read_boxes(pictures)
    captions = read_captions()
    with Retriever.open(bundle) as retriever:
        names = tuple(path.name for path in pictures)
        stock = Gallery(names, retriever.encode_images(pictures))
        perturbed = Gallery(names, retriever.encode_images(pictures, [boxes[name] for name in names]))
        searches = [
            Search(caption, retriever.search(caption, stock), retriever.search(caption, perturbed))
            for caption in captions
        ]
    page = OUT / "index.html"
    page.write_text(render(pictures, boxes, searches, bundle, time.perf_counter() - started), encoding="utf-8")
    print(f"the page to look at: {page.resolve()}")
    return 0


def read_boxes(pictures: list[Path]) -> dict[str, Boxes]:
    table = read_box_file(PHOTOS / "boxes.jsonl").require(path.name for path in pictures)
    return {path.name: table.for_image(path.name, Image.open(path).size) for path in pictures}


def read_captions() -> list[str]:
    """The first caption of each picture."""
    lines = (PHOTOS / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["captions"][0] for line in lines]


def render(pictures: list[Path], boxes: dict[str, Boxes], searches: list[Search], bundle: Path, seconds: float) -> str:
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    verdict = manifest["verification"]["verdict"]
    figures = {path.name: figure(path, boxes[path.name]) for path in pictures}
    sections = "\n".join(section(search, figures) for search in searches)
    return PAGE.format(
        verdict=verdict,
        notes=" ".join(html.escape(note) + "." for note in manifest["notes"]),
        seconds=seconds,
        gallery="".join(figures.values()),
        sections=sections,
    )


def figure(path: Path, boxes: Boxes) -> str:
    """A picture with its boxes drawn over it, self-contained."""
    width, height = boxes.size
    image = Image.open(path).convert("RGB")
    image.thumbnail((360, 360))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    labels = boxes.labels or ("",) * len(boxes)
    rectangles = "".join(
        f'<rect x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}"><title>{html.escape(label)}</title></rect>'
        for (x1, y1, x2, y2), label in zip(boxes.xyxy, labels, strict=True)
    )
    return (
        f'<figure><div><img src="data:image/jpeg;base64,{data}" alt="{path.stem}">'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{rectangles}</svg></div>'
        f"<figcaption>{path.name}</figcaption></figure>"
    )


def section(search: Search, figures: dict[str, str]) -> str:
    """One caption: its pictures in order, with the place that each had without boxes."""
    stock_place = {hit.image: place for place, hit in enumerate(search.stock, start=1)}
    cards = "".join(
        f'<div class="card">{figures[hit.image]}<p><b>#{place}</b> score {hit.score:.3f} (ITC {hit.itc:.3f}, '
        f"rank {hit.rank_itc}; ITM {hit.itm:.3f}) · without boxes #{stock_place[hit.image]}</p></div>"
        for place, hit in enumerate(search.perturbed, start=1)
    )
    return f'<h2>“{html.escape(search.caption)}”</h2><div class="row">{cards}</div>'


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>qpert demonstration</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.05rem; margin: 2rem 0 .5rem }}
.verdict {{ color: #fff; padding: .1rem .7rem; border-radius: .4rem; background: #c02626 }}
.verdict.pass {{ background: #14804a }}
.row {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }}
figure {{ margin: 0 }} figure div {{ position: relative }} img {{ width: 100%; display: block; border-radius: .4rem }}
svg {{ position: absolute; inset: 0; width: 100%; height: 100% }}
rect {{ fill: #ffb30022; stroke: #ffb300; stroke-width: 2px; vector-effect: non-scaling-stroke }}
figcaption, p {{ font-size: .9rem; margin: .3rem 0 }}
</style>
<h1>qpert demonstration <span class="verdict {verdict}">parity: {verdict}</span></h1>
<p>The bundle was exported, verified against PyTorch and searched in {seconds:.0f} s on this machine. {notes}</p>
<div class="row">{gallery}</div>
{sections}
</html>
"""


if __name__ == "__main__":
    sys.exit(main())
