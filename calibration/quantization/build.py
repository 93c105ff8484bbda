"""`qpert quantize`: from a float bundle to a quantised one, or to nothing if the gate fails."""

from __future__ import annotations

import datetime
import importlib.metadata
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from qpert.calibration.graph_files import load_graph
from qpert.calibration.quantization.data import CalibrationData, calibration_data
from qpert.calibration.quantization.gate import AccuracyError, Measured, judge, measure, passed, recall_at_1
from qpert.calibration.quantization.modelopt import check_method, modelopt_python, modelopt_version
from qpert.calibration.quantization.quantized import QuantizedGraph, quantize_graph
from qpert.calibration.quantization.report import quantization_report
from qpert.calibration.quantization.request import QuantizeRequest
from qpert.calibration.quantization.saturation import SATURATION_NOTICE, products_saturate
from qpert.calibration.quantization.sensitivity import BlockCost, block_costs
from qpert.calibration.quantization.speed import SLOWER, speed_ratio
from qpert.calibration.quantization.static import FORMATS
from qpert.calibration.quantization.storage import data_location, write_models
from qpert.calibration.quantization.variants import running
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.manifest import MANIFEST_NAME, Manifest
from qpert.runtime.bundle.staging import staged_folder
from qpert.runtime.files import sha256_of, write_atomically
from qpert.runtime.libraries import load_onnxruntime
from qpert.runtime.progress import Progress, Silent
from qpert.runtime.report.files import json_text
from qpert.runtime.report.html import to_html
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.verification import Gate

WORK = "work"
"""Folder of intermediate files inside the staged bundle, deleted before the bundle is complete."""


@dataclass(frozen=True)
class Plan:
    """What is quantised: the graphs, the blocks (graph, block) left in float, and speed against float on this CPU."""

    graphs: dict[str, QuantizedGraph]
    ratios: dict[str, float]
    given_up: tuple[tuple[str, str], ...] = ()

    def model(self, name: str) -> onnx.ModelProto:
        return self.graphs[name].without({block for graph, block in self.given_up if graph == name})


def quantize_bundle(request: QuantizeRequest, progress: Progress | None = None) -> Bundle:
    """Quantise one bundle.

    Raises:
        InputError: the request, the bundle or the data cannot be used.
        UnavailableError: FP8 without ModelOpt.
        AccuracyError: the gate fails even with all blocks in float that can be. Nothing is written.
    """
    progress = progress or Silent()
    request.check()
    if request.precision == "fp8":
        check_method(request.ranges)
        modelopt_python()
    bundle = Bundle.open(request.bundle)
    request.check_bundle(bundle)
    if request.precision == "int8" and request.target == "cpu" and not request.reduce_range and products_saturate():
        progress.say(SATURATION_NOTICE)
    with staged_folder(request.out, force=request.force) as folder, closing(Encoder(bundle, "cpu")) as encoder:
        (folder / WORK).mkdir()
        data = calibration_data(request, encoder, progress)
        plan = make_plan(bundle, request, encoder, data, folder / WORK, progress)
        costs = block_costs(encoder, plan.graphs, data, folder / WORK, progress) if request.sensitivity else []
        reference, shortlists = measure(encoder, data.split, None, progress, "fp32")
        for given_up in steps(costs):
            plan = replace(plan, given_up=given_up)
            report_given_up(plan, progress)
            write_bundle(folder, bundle, request, plan, data)
            judged = judge_bundle(folder, request, data, reference, shortlists, progress)
            if passed(judged.gates):
                break
        size = {"fp32": graph_bytes(bundle.folder / "onnx"), request.precision: graph_bytes(folder / "onnx")}
        report = judged.to_dict(request.precision) | {
            "precision": request.precision,
            "target": request.target,
            "graph_bytes": size | {"ratio": round(size[request.precision] / size["fp32"], 4)},
            "graphs": {name: graph_description(name, plan) for name in bundle.manifest.graphs},
            "sensitivity": [cost.to_dict() for cost in costs],
            "data": data.describe(request.dataset),
        }
        if not passed(judged.gates):
            raise AccuracyError(failure(judged.gates, costs), report)
        shutil.rmtree(folder / WORK)
        finish(folder, report)
    return Bundle.just_written(request.out)


def make_plan(
    bundle: Bundle, request: QuantizeRequest, encoder: Encoder, data: CalibrationData, folder: Path, progress: Progress
) -> Plan:
    """Quantise the requested graphs; on the CPU, graphs that get slower stay in float unless they are named."""
    graphs, ratios = {}, {}
    names = request.graphs or tuple(bundle.manifest.graphs)
    with progress.stage(f"quantising to {request.precision}", len(names)) as advance:
        for name in names:
            graph = quantize_graph(bundle, name, request, data, folder)
            if request.target == "cpu":
                with running(graph.quantized, bundle.manifest.graphs[name], folder) as session:
                    ratios[name] = speed_ratio(encoder.sessions[name], session, data.feeds[name])
            if request.graphs is None and ratios.get(name, 1.0) < SLOWER:
                progress.say(
                    f"graph {name} is slower in {request.precision} on this CPU ({ratios[name]:.2f} times the speed of "
                    f"fp32) and stays in float; --graphs {','.join(names)} quantises it anyway"
                )
            else:
                graphs[name] = graph
            advance(1)
    return Plan(graphs, ratios)


Blocks = tuple[tuple[str, str], ...]


def steps(costs: list[BlockCost]) -> Iterator[Blocks]:
    """Blocks that compute in float in each attempt: none, then the most sensitive 1, 2, 4, 8 …."""
    order = tuple((cost.graph, cost.block) for cost in costs)
    count = 0
    while True:
        yield order[:count]
        if count >= len(order):
            return
        count = 2 * count or 1


def report_given_up(plan: Plan, progress: Progress) -> None:
    names = ", ".join(f"{graph}: {block}" for graph, block in plan.given_up)
    if names:
        progress.say(f"computing in float: {names}")


def write_bundle(folder: Path, bundle: Bundle, request: QuantizeRequest, plan: Plan, data: CalibrationData) -> None:
    """Write graphs, copied files and manifest; the output of an earlier attempt is replaced."""
    shutil.rmtree(folder / "onnx", ignore_errors=True)
    manifest = bundle.manifest
    models, locations = {}, {}
    for name, graph in manifest.graphs.items():
        path = bundle.graph_path(graph)
        models[name] = plan.model(name) if name in plan.graphs else load_graph(path)
        locations[name] = data_location(path)
    write_models(folder / "onnx", models, locations)
    host_graphs = (graph.file for graph in manifest.host_graphs.values())
    for name in (manifest.tokenizer.file, manifest.samples, *host_graphs):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path(name), folder / name)
    write_manifest(folder, quantized_manifest(manifest, request, plan, data))


def quantized_manifest(manifest: Manifest, request: QuantizeRequest, plan: Plan, data: CalibrationData) -> Manifest:
    tool = tool_of(request)
    return replace(
        manifest,
        precision=request.precision,
        quantization=description(manifest, request, plan, data) | {"tool": tool},
        tools=manifest.tools | tool,
        command=request.command,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        verification=None,
    )


def tool_of(request: QuantizeRequest) -> dict[str, str]:
    if request.precision == "fp8":
        return {"nvidia-modelopt": modelopt_version()}
    return {"onnxruntime": load_onnxruntime().__version__, "onnx": importlib.metadata.version("onnx")}


def description(manifest: Manifest, request: QuantizeRequest, plan: Plan, data: CalibrationData) -> dict[str, Any]:
    """The manifest's `quantization` block: what was quantised, how, for which target, with which data."""
    activations = "float8e4m3fn" if request.precision == "fp8" else FORMATS[request.target].activations
    return {
        "precision": request.precision,
        "target": request.target,
        "arch": list(request.arch),
        "form": "static Q/DQ",
        "activations": f"{activations}, per tensor",
        "weights": f"{'float8e4m3fn' if request.precision == 'fp8' else 'QInt8'}, symmetric, per output channel",
        "tables": "int8, per row",
        "ranges": request.ranges,
        "reduce_range": request.reduce_range,
        "data": data.describe(request.dataset),
        "graphs": {name: graph_description(name, plan) for name in manifest.graphs},
        "source": {graph.file: manifest.files[graph.file] for graph in manifest.graphs.values()},
    }


def graph_description(name: str, plan: Plan) -> dict[str, Any]:
    ratio = {"speed_on_this_cpu": round(plan.ratios[name], 2)} if name in plan.ratios else {}
    if name not in plan.graphs:
        return {"form": "float"} | ratio
    given_up = [block for graph, block in plan.given_up if graph == name]
    candidates = plan.graphs[name].candidates
    weights_only = sum(candidate.block in given_up for candidate in candidates)
    return {
        "form": "quantized",
        "products": len(candidates) - weights_only,
        "products_weights_only": weights_only,
        "blocks_weights_only": given_up,
        "products_left_by_tool": list(plan.graphs[name].left),
        "tables": list(plan.graphs[name].tables),
    } | ratio


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest with the hash of every file now in the bundle, except the work folder's."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST_NAME and not name.startswith(f"{WORK}/"):
            files[name] = sha256_of(path)
    write_atomically(folder / MANIFEST_NAME, replace(manifest, files=files).to_json())


@dataclass(frozen=True, eq=False)
class Judged:
    """Scores of both bundles on one split, and the gates. owners: int64 [T], the image of each caption."""

    reference: Measured
    got: Measured
    owners: npt.NDArray[np.int64]
    gates: tuple[Gate, ...]

    def to_dict(self, precision: str) -> dict[str, Any]:
        """The verdict's part of `reports/quantize.json`."""
        sides = {"fp32": self.reference, precision: self.got}
        return {
            "verdict": "pass" if passed(self.gates) else "fail",
            "gates": [gate.to_dict() for gate in self.gates],
            "recall_at_1": {name: recall_at_1(side.itc, self.owners) for name, side in sides.items()},
        }


def judge_bundle(
    folder: Path,
    request: QuantizeRequest,
    data: CalibrationData,
    reference: Measured,
    shortlists: npt.NDArray[np.int64],
    progress: Progress,
) -> Judged:
    """Run the written bundle and compare it with the float one."""
    with closing(Encoder(Bundle.open(folder), "cpu")) as encoder:
        got, _ = measure(encoder, data.split, shortlists, progress, request.precision)
    owners = data.split.image_of_caption
    gates = judge(reference, got, owners, max_drop=request.max_drop, min_agreement=request.min_agreement)
    return Judged(reference, got, owners, gates)


def failure(gates: tuple[Gate, ...], costs: list[BlockCost]) -> str:
    worst = "; ".join(f"{gate.name}: {gate.value:.3g}, allowed {gate.limit:.3g}" for gate in gates if not gate.passed)
    tried = f"even with all {len(costs)} blocks computing in float" if costs else "and no sensitivity was measured"
    return (
        f"the quantised bundle fails its gate ({worst}) {tried}; nothing was written: use more --samples, other "
        "--ranges, fewer --graphs, or allow more with --max-drop and --min-agreement"
    )


def graph_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def finish(folder: Path, report: dict[str, Any]) -> None:
    """Write the reports, and last the gates into the manifest."""
    files = {"quantize.json": json_text(report), "quantize.html": to_html(quantization_report(report))}
    manifest = Bundle.open(folder).add_reports(files).manifest
    block = (manifest.quantization or {}) | {"gates": report["gates"], "recall_at_1": report["recall_at_1"]}
    write_manifest(folder, replace(manifest, quantization=block))
