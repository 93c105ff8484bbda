"""What is measured: the models, sizes and providers of an acceptance, and the small ones of a dry run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A checkpoint and how it is verified.

    random: `full` or `small` for a checkpoint of random numbers (`measure.checkpoint`), "" for a published one.
    options: of `qpert export blip2`. images: of the levels `rank` and `recall`; None is the command's default.
    rerank: length of their shortlists; None is the command's default.
    """

    name: str
    title: str
    random: str = ""
    options: tuple[str, ...] = ()
    images: int | None = None
    rerank: int | None = None


@dataclass(frozen=True)
class Scale:
    """One size of the whole run.

    judged: whether figures of speed and memory are held against their goals. engine_target: of `qpert build`.
    measured: name and precision of the bundle whose speed, memory and throughput are measured. compiled: graphs that
    torch.compile is tried on. seconds: time limit of one row's measurement. minutes: of a line.
    """

    models: tuple[Model, ...]
    precisions: tuple[str, ...]
    providers: tuple[str, ...]
    build_only: tuple[str, ...]
    engine_target: str
    measured: tuple[str, str]
    batches: tuple[int, ...]
    boxes: tuple[int, ...]
    texts: tuple[int, ...]
    compiled: tuple[str, ...]
    repeats: int
    seconds: float
    evaluated_images: int
    minutes: float
    judged: bool

    @property
    def dry_run(self) -> bool:
        return not self.judged


ACCEPTANCE = Scale(
    models=(
        Model("demo", "the demonstration"),
        # 16 images with 80 captions: the reference is eager float32 on the CPU, where one image takes seconds.
        Model("full", "BLIP-2 at full size, random weights", "full", images=16, rerank=16),
    ),
    precisions=("fp32", "fp16"),
    providers=("cuda", "tensorrt", "rtx"),
    build_only=(),
    engine_target="current",
    measured=("full", "fp16"),
    batches=(1, 8),
    boxes=(0, 1, 8, 32),
    texts=(1, 64),
    compiled=("vision", "image_query", "text", "itm"),
    repeats=30,
    seconds=60.0,
    evaluated_images=256,
    minutes=90,
    judged=True,
)
"""`qpert export`'s default limits are 8 images, 32 boxes and 64 texts a call: the largest sizes here."""

DRY_RUN = Scale(
    models=(
        Model(
            "small",
            "a small BLIP-2, random weights",
            "small",
            (
                *("--vision-heads", "2", "--qformer-heads", "2", "--max-length", "32"),
                *("--max-batch", "2", "--max-boxes", "8", "--max-text", "8"),
            ),
            images=4,
            rerank=4,
        ),
    ),
    precisions=("fp32",),
    providers=("cpu",),
    build_only=("rtx",),
    engine_target="sm89",
    measured=("small", "fp32"),
    batches=(1, 2),
    boxes=(0, 1, 8),
    texts=(1, 8),
    compiled=("text",),  # a quarter of a minute of compiling for each shape
    repeats=3,
    seconds=1.0,
    evaluated_images=6,
    minutes=10,
    judged=False,
)
"""The same lines, each as short as it can be. TensorRT-RTX compiles for other machines' GPUs, so it is tried too."""
