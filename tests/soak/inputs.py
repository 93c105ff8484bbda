"""Where hostile inputs come from: structures that Hypothesis makes up, and real files with some bytes changed."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

TEXT = st.text(st.characters(exclude_categories=()), max_size=60)
"""Every code point there is, lone surrogates and control characters included."""
ODD_NUMBERS = st.sampled_from([float("nan"), float("inf"), -1, 0, 1e308, -1e308, 2**63, 2**64, 10**400, True, 1e-320])
NUMBERS = st.one_of(st.integers(-10, 700), st.floats(-10, 700), ODD_NUMBERS)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def dumped(value: Any) -> bytes:
    """JSON bytes, with NaN and lone surrogates as Python writes them."""
    return json.dumps(value).encode()


# Bytes


def mutated(original: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    """`original` with stretches replaced, inserted, removed or repeated, or cut off."""
    data = bytearray(original)
    for kind, where, extra in edits:
        place = where % (len(data) + 1)
        if kind == "replace":
            data[place : place + len(extra)] = extra
        elif kind == "insert":
            data[place:place] = extra
        elif kind == "remove":
            del data[place : place + 1 + len(extra) * 7]
        elif kind == "repeat":
            data[place:place] = data[place : place + 1 + len(extra) * 50]
        else:
            del data[place:]
    return bytes(data)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "replace", "replace", "insert", "remove", "repeat", "cut"]),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=8) | st.sampled_from([b"\x00", b"\xff\xff", b"-", b"9" * 30, b'"', b"[" * 2000]),
    ),
    max_size=6,
)


def mutations(originals: list[bytes]) -> st.SearchStrategy[bytes]:
    return st.builds(mutated, st.sampled_from(originals), EDITS)


# Images


def picture_files() -> list[bytes]:
    """One small real file of every format and mode that PIL writes and people have."""
    rng = np.random.default_rng(4)
    base = Image.fromarray(rng.integers(0, 256, (24, 31, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (24, 31)).astype(np.uint16))
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (base, "JPEG", {"quality": 60}),
        (base, "JPEG", {"progressive": True, "exif": turned()}),
        (base.convert("CMYK"), "JPEG", {}),
        (base, "PNG", {}),
        (base.convert("RGBA"), "PNG", {}),
        (base.convert("P"), "PNG", {"transparency": 3}),
        (deep, "PNG", {}),
        (base.convert("1"), "TIFF", {"compression": "group4"}),
        (base, "TIFF", {"compression": "tiff_lzw"}),
        (base.convert("P"), "GIF", {"save_all": True, "append_images": [base.convert("P")]}),
        (base, "BMP", {}),
        (base, "WEBP", {"lossless": True}),
        (base, "PPM", {}),
        (base, "ICO", {}),
    ]
    files = []
    for image, kind, settings in kinds:
        stream = io.BytesIO()
        image.save(stream, kind, **settings)
        files.append(stream.getvalue())
    return files


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


ARRAYS = hnp.arrays(
    st.sampled_from([np.uint8, np.uint8, np.uint8, np.float32, np.int64, np.bool_]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9) | st.tuples(st.integers(0, 40), st.just(3)),
) | hnp.arrays(np.uint8, st.tuples(st.integers(1, 50), st.integers(1, 50), st.just(3)))


# Boxes, annotations, manifests

BOX_ROWS = st.dictionaries(st.sampled_from(["image", "x1", "y1", "x2", "y2", "score", "label", "bbox"]), JSON) | (
    st.builds(
        lambda image, corners: {"image": image, **dict(zip(("x1", "y1", "x2", "y2"), corners, strict=True))},
        st.sampled_from(["a.jpg", "b.jpg", "folder/a.jpg", "a"]),
        st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    )
)
COCO_ROWS = st.fixed_dictionaries(
    {}, optional={"image_id": JSON, "bbox": JSON | st.lists(NUMBERS, min_size=4, max_size=4), "score": JSON}
)


def box_documents() -> st.SearchStrategy[tuple[str, bytes]]:
    """(extension, content) of box files."""
    lines = st.lists(BOX_ROWS, max_size=4).map(lambda rows: b"\n".join(map(dumped, rows)))
    coco = st.one_of(
        st.lists(COCO_ROWS, max_size=4),
        st.fixed_dictionaries({"images": JSON, "annotations": st.lists(COCO_ROWS, max_size=3) | JSON}),
        JSON,
    ).map(dumped)
    made = [(".jsonl", lines), (".json", coco)]
    real = [(extension, mutations(files)) for extension, files in BOX_FILES.items()]
    return st.one_of([st.tuples(st.just(extension), content) for extension, content in [*made, *real]])


BOX_FILES: dict[str, list[bytes]] = {
    ".jsonl": [b'{"image": "a.jpg", "x1": 1, "y1": 2.5, "x2": 9, "y2": 8, "score": 0.5, "label": "dog"}\n' * 2],
    ".csv": [b"image,x1,y1,x2,y2,score,label\na.jpg,1,2.5,9,8,0.5,dog\nb.jpg,0,0,31,24,1,\n"],
    ".json": [
        b'[{"image_id": 7, "bbox": [1, 2, 8, 6], "score": 0.5, "category_id": 3}]',
        b'{"images": [{"id": 7, "file_name": "a.jpg", "width": 31, "height": 24}], "categories": '
        b'[{"id": 3, "name": "dog"}], "annotations": [{"image_id": 7, "bbox": [1, 2, 8, 6], "category_id": 3}]}',
    ],
    ".xml": [
        b"<annotation><filename>a.jpg</filename><size><width>31</width><height>24</height><depth>3</depth></size>"
        b"<object><name>12</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>"
        b"<object><name>13</name><scene>1</scene><nobndbox>1</nobndbox></object></annotation>"
    ],
}

ANNOTATION = b'[{"image": "images/a.jpg", "caption": ["a dog", "two dogs"]}, {"image": "images/b.jpg", "caption": "a"}]'
ANNOTATIONS = (
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "image": st.sampled_from(["images/a.jpg", "images/b.jpg", "../a.jpg", "/etc/passwd", "images/\0"])
                | JSON,
                "caption": st.lists(TEXT, max_size=3) | JSON,
            },
        ),
        max_size=3,
    ).map(dumped)
    | st.lists(
        st.fixed_dictionaries(
            {
                "image": st.sampled_from(["images/a.jpg", "images/b.jpg"]),
                "caption": st.lists(TEXT, min_size=1, max_size=3),
            }
        ),
        min_size=1,
        max_size=2,
    ).map(dumped)
    | JSON.map(dumped)
    | mutations([ANNOTATION])
)


def manifests(valid: bytes) -> st.SearchStrategy[bytes]:
    """A valid manifest with a value anywhere in it replaced or removed, or with bytes changed."""
    values = json.loads(valid)
    places = list(paths_in(values))

    def edited(path: tuple[Any, ...], value: Any, remove: bool) -> bytes:
        document = json.loads(valid)
        owner = document
        for key in path[:-1]:
            owner = owner[key]
        if remove:
            del owner[path[-1]]
        else:
            owner[path[-1]] = value
        return dumped(document)

    odd_paths = st.sampled_from(["../x", "/etc/passwd", "", ".", "onnx", "onnx/vision.onnx", "a" * 5000, "\0", "C:\\x"])
    return st.builds(edited, st.sampled_from(places), JSON | odd_paths, st.booleans()) | mutations([valid])


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Where every value of a JSON document lies."""
    if path:
        yield path
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*path, key))
