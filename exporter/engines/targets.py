"""Chooses the library and the GPUs to build for, or raises, before any work is done."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from qpert.runtime.errors import InputError, UnavailableError
from qpert.runtime.sessions.gpus import FIRST_WITH, Gpu
from qpert.runtime.sessions.tensorrt.libraries import FLAVORS, Flavor, find_flavor, flavor_version, load_flavor

ARCHITECTURE = re.compile(r"sm\d{2,3}")


@dataclass(frozen=True)
class Target:
    """The GPUs of one engine: one architecture, or several that share it (`sm80+sm89`)."""

    architectures: tuple[str, ...]

    @property
    def name(self) -> str:
        return "+".join(self.architectures)


@dataclass(frozen=True)
class BuildPlan:
    """The library and targets of a build, and the reason for the choice."""

    flavor: Flavor
    library: Any
    targets: tuple[Target, ...]
    gpu: Gpu | None
    why: str

    @property
    def version(self) -> str:
        return flavor_version(self.library)

    def folder(self, target: Target) -> str:
        """`sm89-rtx1.7.1.116`: the engine's folder below `engines/`."""
        return f"{target.name}-{self.flavor.name}{self.version}"


def parse_targets(text: str) -> str | tuple[Target, ...]:
    """`auto` and `current` unchanged; `sm80,sm86+sm89` as two targets.

    Raises:
        InputError: `text` is none of these.
    """
    if text in ("auto", "current"):
        return text
    targets = tuple(Target(tuple(part.strip() for part in entry.split("+"))) for entry in text.split(","))
    named = [name for target in targets for name in target.architectures]
    if wrong := [name for name in named if not ARCHITECTURE.fullmatch(name)]:
        raise InputError(
            f"got target {wrong[0]!r}, expected auto, current, or architectures such as sm80,sm89 (one engine each) or "
            "sm80+sm89 (one engine for both)",
            code="engine-target-unknown",
        )
    if len(set(targets)) < len(targets) or any(len(set(t.architectures)) < len(t.architectures) for t in targets):
        raise InputError(
            f"target {text!r} names an architecture or an engine twice; name each once", code="engine-target-twice"
        )
    return targets


def plan_build(*, flavor: str, target: str, precision: str, gpu: Gpu | None) -> BuildPlan:
    """Choose the library and its targets.

    Args:
        flavor: `auto`, `classic` or `rtx`. `auto` takes classic TensorRT if it is installed and the engines are for
            this machine's GPU, where it times kernels; else TensorRT-RTX, which builds for GPUs of other machines.
        target: `auto`, `current`, or architectures. `auto` is this machine's GPU; without one, every architecture that
            the flavour can build for.
        precision: the bundle's.
        gpu: this machine's.

    Raises:
        InputError: an unknown flavour or target.
        UnavailableError: no installed TensorRT can build for these targets.
    """
    wanted = parse_targets(target)
    if wanted == "current" and gpu is None:
        raise UnavailableError(
            "--target current needs an NVIDIA GPU, and this machine has none; name the architectures of the engines, "
            "such as --target sm80,sm89",
            code="gpu-missing",
        )
    candidates = list(FLAVORS.values()) if flavor == "auto" else [find_flavor(flavor)]
    refusals: list[UnavailableError] = []
    for candidate in candidates:
        try:
            targets = targets_of(candidate, wanted, precision, gpu)
            library = load_flavor(candidate)
        except UnavailableError as error:
            refusals.append(error)
            continue
        why = "as requested" if flavor != "auto" else why_taken(candidate, targets, gpu, refusals)
        return BuildPlan(candidate, library, targets, gpu, why)
    code = refusals[0].code if len(refusals) == 1 else "engine-target-unavailable"
    raise UnavailableError("; ".join(map(str, refusals)), code=code)


def targets_of(flavor: Flavor, wanted: str | tuple[Target, ...], precision: str, gpu: Gpu | None) -> tuple[Target, ...]:
    """The targets of one flavour. Raises UnavailableError if it cannot build for one of them."""
    if isinstance(wanted, str):
        wanted = (Target((gpu.architecture,)),) if gpu else every_target(flavor, precision)
    for target in wanted:
        check_target(flavor, target, precision, gpu)
    return wanted


def every_target(flavor: Flavor, precision: str) -> tuple[Target, ...]:
    """One target per GPU family of the flavour, with the architectures that support the precision."""
    if not flavor.families:
        raise UnavailableError(
            f"{flavor.title} builds only on the GPU that will run the engine, and this machine has none",
            code="gpu-missing",
        )
    families = [tuple(name for name in family if runs_precision(name, precision)) for family in flavor.families]
    return tuple(Target(family) for family in families if family)


def check_target(flavor: Flavor, target: Target, precision: str, gpu: Gpu | None) -> None:
    """Raises UnavailableError if `flavor` cannot build for `target` on this machine."""
    here = gpu.architecture if gpu else "none"
    if not flavor.architectures and target.architectures != (here,):
        raise UnavailableError(
            f"{flavor.title} builds only on the GPU that will run the engine: the target is {target.name}, "
            f"this machine's GPU is {here}",
            code="engine-target-other-gpu",
        )
    for architecture in target.architectures:
        if flavor.architectures and architecture not in flavor.architectures:
            raise UnavailableError(
                f"{flavor.title} builds for {', '.join(flavor.architectures)}, not for {architecture}; build with "
                "classic TensorRT on a machine with such a GPU",
                code="engine-target-unsupported",
            )
        if not runs_precision(architecture, precision):
            raise UnavailableError(
                f"{architecture} has no {precision} matrix products; export for it with --precision fp16",
                code="precision-unsupported",
            )


def runs_precision(architecture: str, precision: str) -> bool:
    return int(architecture.removeprefix("sm")) >= FIRST_WITH.get(precision, 0)


def why_taken(flavor: Flavor, targets: tuple[Target, ...], gpu: Gpu | None, refusals: list[UnavailableError]) -> str:
    if refusals:
        return f"the other library cannot: {'; '.join(map(str, refusals))}"
    return f"it is installed and times its kernels on this machine's {gpu.name}" if gpu else "it is installed"
