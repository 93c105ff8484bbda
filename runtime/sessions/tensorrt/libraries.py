"""The two libraries that compile engines and run them: classic TensorRT and TensorRT-RTX.

They share one Python API, so that whatever builds or runs an engine takes the module that `load_flavor` gives and is
the same code for both, and for TensorRT 10.3 (JetPack 6) to 11. What differs is in the table, and in `builds_ahead` and
`captures_by_itself`; tests check every use against NVIDIA's bindings of each version (`tests/trt_usage.py`).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from qpert.runtime.errors import InputError, UnavailableError


@dataclass(frozen=True)
class Flavor:
    """One of the two libraries.

    families: GPUs that it compiles for wherever it is installed, without a GPU; those of one family can share an
    engine, which is as large and takes as long to build as an engine for one of them. A library without any compiles
    only on, and for, the GPU of the machine.
    uses_timing_cache: whether a build gets faster by the timings of the last one.
    """

    name: str
    title: str
    module: str
    install: str
    families: tuple[tuple[str, ...], ...]
    uses_timing_cache: bool

    @property
    def architectures(self) -> tuple[str, ...]:
        return tuple(name for family in self.families for name in family)


FLAVORS: dict[str, Flavor] = {
    flavor.name: flavor
    for flavor in (
        Flavor("classic", "TensorRT", "tensorrt", "pip install 'qpert[trt]'", (), True),
        Flavor(
            "rtx",
            "TensorRT-RTX",
            "tensorrt_rtx",
            "pip install 'qpert[rtx]'",
            # Source: TensorRT-RTX support matrix, 1.5 and later. Hopper (sm90) and the data-centre Blackwell (sm100)
            # are not in it, and asking for them raises nothing: the library writes a log line and goes on. Turing
            # stays apart, as the matrix says: its limits would slow the others down.
            (("sm75",), ("sm80", "sm86", "sm89", "sm120", "sm121")),
            # Source: TensorRT-RTX 1.1 and 1.2 release notes. A timing cache made the library look for a GPU, and
            # changed nothing in the engine; now it does nothing.
            False,
        ),
    )
}
"""By the name that `--flavor` takes."""


def find_flavor(name: str) -> Flavor:
    if name not in FLAVORS:
        raise InputError(f"got TensorRT flavour {name!r}, expected one of {', '.join(FLAVORS)}", code="tensorrt-flavor")
    return FLAVORS[name]


def load_flavor(flavor: Flavor) -> Any:
    """Import the library.

    Raises:
        UnavailableError: it is not installed, or cannot be loaded here.
    """
    try:
        return importlib.import_module(flavor.module)
    except ImportError as error:
        if getattr(error, "name", None) == flavor.module:
            raise UnavailableError(
                f"{flavor.title} is not installed; {flavor.install}", code="tensorrt-missing"
            ) from error
        raise UnavailableError(
            f"{flavor.title} is installed and cannot be loaded ({error}); install it again: {flavor.install}",
            code="tensorrt-unloadable",
        ) from error
    except OSError as error:  # a shared library that it needs
        raise UnavailableError(
            f"{flavor.title} is installed and cannot be loaded ({error}); install it again: {flavor.install}",
            code="tensorrt-unloadable",
        ) from error


def builds_ahead(library: Any) -> bool:
    """Whether a loaded library compiles for GPUs that are named, wherever it runs: TensorRT-RTX does."""
    return hasattr(library, "ComputeCapability")


def captures_by_itself(library: Any) -> bool:
    """Whether a loaded library records repeated shapes as CUDA graphs by itself: TensorRT-RTX does."""
    return hasattr(library, "CudaGraphStrategy")


def flavor_version(library: Any) -> str:
    """The version of a loaded library, as engines record it."""
    return str(library.__version__)
