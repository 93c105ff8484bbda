"""The options of `qpert quantize`, and the checks that need no work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.staging import check_target
from qpert.runtime.errors import InputError
from qpert.runtime.sessions.gpus import FIRST_WITH

PRECISIONS = ("int8", "fp8")
TARGETS = ("cpu", "tensorrt")
RANGES = ("minmax", "percentile", "entropy")
MIN_SAMPLES = 16


@dataclass(frozen=True)
class QuantizeRequest:
    """One call of `qpert quantize`.

    dataset: the root of a data set, or `demo`. skip_bad_boxes: leave out its boxes that cannot be used. samples: images
    to measure ranges on. limit: images of the split for the gate, None for all. graphs: the graphs to quantise; None is
    all that do not get slower. max_drop: points of R@1. min_agreement: percent of queries whose
    first result stays the same.
    """

    bundle: Path
    out: Path
    precision: str = "int8"
    target: str = "cpu"
    arch: tuple[str, ...] = ()
    dataset: str = "demo"
    split: str = "val"
    skip_bad_boxes: bool = False
    samples: int = 64
    limit: int | None = None
    graphs: tuple[str, ...] | None = None
    ranges: str = "minmax"
    reduce_range: bool = False
    sensitivity: bool = True
    max_drop: float = 0.5
    min_agreement: float = 80.0
    force: bool = False
    command: str = ""

    def check(self) -> None:
        """Raise InputError for options that are wrong for any bundle."""
        for name, value, allowed in (
            ("--precision", self.precision, PRECISIONS),
            ("--target", self.target, TARGETS),
            ("--ranges", self.ranges, RANGES),
        ):
            if value not in allowed:
                raise InputError(f"{name} is {value!r}, expected one of {', '.join(allowed)}", code="quantize-option")
        if self.graphs == ():
            raise InputError("--graphs names no graph; leave it out, or name some", code="quantize-graphs")
        if self.samples < MIN_SAMPLES:
            raise InputError(
                f"--samples is {self.samples}, expected at least {MIN_SAMPLES}: ranges of a few images "
                "clip the activations of others",
                code="samples-too-few",
            )
        if self.limit is not None and self.limit < self.samples:
            raise InputError(
                f"--limit is {self.limit}, expected at least the {self.samples} images of --samples",
                code="limit-below-samples",
            )
        if not 0 <= self.max_drop <= 100 or not 0 <= self.min_agreement <= 100:
            raise InputError(
                "--max-drop and --min-agreement are percentages; expected numbers from 0 to 100", code="gate-percent"
            )
        self._check_target()
        check_target(self.out, force=self.force)

    def _check_target(self) -> None:
        if self.precision == "fp8" and self.target == "cpu":
            raise InputError(
                "fp8 needs a GPU, as CPUs have no FP8 products; use --target tensorrt, or --precision int8",
                code="fp8-on-cpu",
            )
        if self.arch and self.target != "tensorrt":
            raise InputError(
                f"--arch {','.join(self.arch)} is for --target tensorrt, got --target {self.target}",
                code="arch-without-tensorrt",
            )
        for arch in self.arch:
            number = arch.removeprefix("sm")
            if not arch.startswith("sm") or not number.isdigit():
                raise InputError(f"--arch is {arch!r}, expected names such as sm80,sm89", code="arch-format")
            if self.precision == "fp8" and int(number) < FIRST_WITH["fp8"]:
                raise InputError(
                    f"{arch} has no FP8 products, they begin with sm{FIRST_WITH['fp8']}; use --precision int8 for it, "
                    "or leave it out of --arch",
                    code="fp8-architecture",
                )

    def check_bundle(self, bundle: Bundle) -> None:
        """Raise InputError if the bundle cannot be quantised, or lacks a requested graph."""
        manifest = bundle.manifest
        if unknown := [name for name in self.graphs or () if name not in manifest.graphs]:
            raise InputError(
                f"--graphs is {', '.join(unknown)}, expected one or more of {', '.join(manifest.graphs)}",
                code="quantize-graphs",
            )
        if manifest.quantization is not None or manifest.precision in PRECISIONS:
            raise InputError(
                f"{bundle.folder} is already quantised ({manifest.precision}); give the fp32 bundle it was made from",
                code="bundle-quantized",
            )
        if manifest.precision != "fp32":
            raise InputError(
                f"{bundle.folder} is a {manifest.precision} bundle, expected fp32: ranges and the gate need the "
                "original numbers; export it with --precision fp32 first",
                code="bundle-precision",
            )
        if self.out.resolve() == bundle.folder.resolve():
            raise InputError(f"--out {self.out} is the bundle itself; choose another folder", code="out-is-bundle")
