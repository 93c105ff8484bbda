"""Every graph compiles for every architecture, in every precision, with the perturbation and without.

Parsing proves nothing (an fp32 `Attention` parses and cannot be compiled), so everything is compiled, by the real
TensorRT-RTX. An engine for several architectures is compiled for each of them; the perturbed graphs, which take
seconds, go that way only, the others one architecture at a time too.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper
from tiny_model import THRESHOLD

from qpert.exporter.engines.builder import BuildJob, build_engine
from qpert.exporter.engines.profiles import profile_of
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.inputs.perturbation import Perturbation

pytestmark = pytest.mark.slow

GRAPH_NAMES = ("vision", "image_query", "text", "itm")

rtx = pytest.importorskip("tensorrt_rtx", reason="needs the extra rtx: pip install 'qpert[rtx]'")

ARCHITECTURES = ("sm80", "sm86", "sm89", "sm120")


@pytest.fixture(scope="module")
def demo_half(tmp_path_factory):
    """The demonstration checkpoint in fp16."""
    from qpert.exporter.export import ExportRequest, export_bundle

    return export_bundle(
        ExportRequest("blip2", "demo", tmp_path_factory.mktemp("half") / "bundle", precision="fp16")
    ).folder


@pytest.fixture(scope="module")
def demo(demo_bundle, demo_half):
    return {"fp32": demo_bundle, "fp16": demo_half}


@pytest.fixture(scope="module")
def perturbed(tiny_bundle, half_bundle):
    """Small bundles whose pair stage is perturbed too."""
    return {"fp32": tiny_bundle, "fp16": half_bundle}


@pytest.fixture(scope="module")
def stock(export_tiny, stock_export):
    """Small bundles without perturbation."""
    return {
        "fp32": stock_export.folder,
        "fp16": export_tiny(precision="fp16", perturbation=Perturbation(stages="none")),
    }


def compile_graph(folder, name, architectures):
    """Build one graph of a bundle; the engine holds at least the graph's own constants, once for all architectures."""
    bundle = Bundle.open(folder)
    spec = bundle.manifest.graphs[name]
    job = BuildJob(name, bundle.graph_path(spec), profile_of(spec), architectures)
    plan = build_engine(rtx, job, lambda count: None).plan
    assert plan.nbytes >= bytes_of_constants(bundle.graph_path(spec))


def bytes_of_constants(path: Path) -> int:
    """What the weights of a graph take, in the precision in which the graph has them."""
    return sum(numpy_helper.to_array(each, str(path.parent)).nbytes for each in onnx.load(path).graph.initializer)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_every_graph_of_the_demonstration_compiles_for_every_architecture(demo, precision, name):
    compile_graph(demo[precision], name, ARCHITECTURES)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_perturbed_pair_stage_compiles_for_every_architecture(perturbed, precision):
    compile_graph(perturbed[precision], "itm", ARCHITECTURES)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_every_stock_graph_compiles_for_each_architecture_alone(stock, precision, architecture, name):
    compile_graph(stock[precision], name, (architecture,))


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_bfloat16_compiles_where_the_hardware_has_it(bf16_bundle, name):
    compile_graph(bf16_bundle, name, ARCHITECTURES)


@pytest.fixture(scope="module")
def bf16_bundle(export_tiny) -> Path:
    return export_tiny(precision="bf16", perturbation=Perturbation(threshold=THRESHOLD))


@pytest.mark.parametrize("name", ["vision", "text"])
def test_turing_has_an_engine_of_its_own(demo_half, name):
    compile_graph(demo_half, name, ("sm75",))
