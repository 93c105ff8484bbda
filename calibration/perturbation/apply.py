"""A bundle with other perturbation settings, as if exported with them, and with their provenance.

α, weight and reduction are defaults in the manifest, and constants of `boxes.onnx`, which is written anew. The
threshold is a number inside the graphs, so it is replaced there; the reference outputs with boxes depend on it too and
are recorded again, from the checkpoint.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qpert.calibration.perturbation.split_graph import threshold_names
from qpert.runtime.bundle.folder import REPORTS, Bundle
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.bundle.manifest import MANIFEST_NAME, Manifest
from qpert.runtime.bundle.roles import BOXES, IMAGE_TOKENS
from qpert.runtime.bundle.samples import Case, Samples
from qpert.runtime.errors import BundleError, InputError
from qpert.runtime.files import sha256_of, write_atomically
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.progress import Progress, Silent
from qpert.runtime.sessions.tensorrt.engines import ENGINES

if TYPE_CHECKING:
    from qpert.exporter.references.protocol import MarginReference
    from qpert.exporter.references.recording import InputMaker


def apply_settings(
    bundle: Bundle,
    settings: Perturbation,
    target: Path,
    *,
    provenance: dict[str, Any],
    reports: Mapping[str, str],
    checkpoint: str | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Write a bundle with `settings` to `target`, which may be the bundle itself.

    Args:
        bundle: the source; unchanged unless it is the target, which is then replaced completely or not at all.
        settings: with the bundle's coverage, stages, norm and centring, which are fixed in its graphs and files.
        target: a new folder, or `bundle.folder`.
        provenance: becomes the manifest's `calibration`.
        reports: files to write in `reports/`, by name.
        checkpoint: the weights, if they have moved since the export; only a new threshold needs them.

    Raises:
        InputError: the target exists, or the checkpoint is not the exported one. UnavailableError: it is not available.
    """
    from qpert.runtime.bundle.staging import staged_folder

    progress = progress or Silent()
    manifest = bundle.manifest
    retuned = settings.threshold != manifest.perturbation.threshold
    graphs = perturbed_graphs(manifest) if retuned else []
    graphs += filter(None, [manifest.find(BOXES)])
    with progress.stage("recording reference outputs from PyTorch" if retuned else "recording box weights"):
        samples = new_samples(bundle, settings, checkpoint)
    in_place = target.resolve() == bundle.folder.resolve()
    with progress.stage("writing the bundle"), staged_folder(target, force=in_place) as folder:
        changed = {graph.file for graph in graphs} | {manifest.samples}
        carry_files(bundle, folder, leave_out=changed, engines=not retuned, link=in_place)
        for graph in graphs:
            write_graph(bundle, graph, folder, settings)
        save_samples(samples, folder / manifest.samples)
        for name, text in reports.items():
            (folder / REPORTS).mkdir(exist_ok=True)
            write_atomically(folder / REPORTS / name, text)
        written = [*changed, *(REPORTS + name for name in reports)]
        kept = {name: digest for name, digest in manifest.files.items() if not name.startswith(REPORTS)}
        files = kept | {name: sha256_of(folder / name) for name in written}
        new = replace(
            manifest,
            perturbation=settings,
            files=dict(sorted(files.items())),
            verification=None,
            calibration=provenance,
        )
        write_atomically(folder / MANIFEST_NAME, new.to_json())
    if retuned and (bundle.folder / ENGINES).is_dir():
        progress.say(f"engines built for the old threshold are left out; next: qpert build {target}")
    return Bundle.just_written(target)


def perturbed_graphs(manifest: Manifest) -> list[GraphSpec]:
    """The graphs that hold the threshold."""
    return [graph for graph in manifest.graphs.values() if graph.takes_boxes]


def write_graph(bundle: Bundle, graph: GraphSpec, folder: Path, settings: Perturbation) -> None:
    """Write a graph of the bundle, below `folder`, as it is with `settings`."""
    from qpert.exporter.host_graphs.write import write_boxes_graph

    if graph.role == BOXES:
        write_boxes_graph(folder, graph, bundle.manifest.token_grid, settings)
    else:
        write_threshold(bundle.graph_path(graph), folder / graph.file, settings.threshold)


def write_threshold(source: Path, target: Path, threshold: float) -> None:
    """Write the graph in `source` with another τ; its weights stay in their file.

    Raises:
        BundleError: the graph has no τ.
    """
    import onnx

    model = onnx.load_model(source, load_external_data=False)
    names = threshold_names(model.graph)
    if not names:
        raise BundleError(
            f"{source} has no initializer named …/threshold; export the bundle again with this version",
            code="threshold-missing",
        )
    for tensor in model.graph.initializer:
        if tensor.name in names:
            value = np.array(threshold, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    onnx.save_model(model, target)


def carry_files(bundle: Bundle, folder: Path, *, leave_out: set[str], engines: bool, link: bool) -> None:
    """Copy the bundle's files, except reports and `leave_out`, and its engines if `engines`.

    `link`: the bundle is about to be deleted, so its files can be linked. They must not stay in two folders: the onnx
    library treats a data file with several hard links as an attack and does not read it.
    """
    names = [name for name in bundle.manifest.files if not name.startswith(REPORTS) and name not in leave_out]
    if engines:
        built = (path for path in (bundle.folder / ENGINES).rglob("*") if path.is_file())
        names += [path.relative_to(bundle.folder).as_posix() for path in built]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (os.link if link else shutil.copy2)(bundle.path(name).resolve(), folder / name)


# Recorded outputs


def new_samples(bundle: Bundle, settings: Perturbation, checkpoint: str | None) -> Samples:
    """The bundle's samples as an export with `settings` would have recorded them."""
    from qpert.exporter.references.boxes import box_samples

    manifest = bundle.manifest
    samples = bundle.samples()
    boxes = box_samples(settings, manifest.token_grid)
    cases = samples.cases
    if settings.threshold != manifest.perturbation.threshold:
        cases = recorded_again(bundle, samples, settings, checkpoint)
    return replace(samples, cases=cases, boxes=boxes)


def recorded_again(
    bundle: Bundle, samples: Samples, settings: Perturbation, checkpoint: str | None
) -> tuple[Case, ...]:
    """The cases; those with boxes are recorded again from PyTorch at the new threshold."""
    from qpert.exporter.families import find_family
    from qpert.exporter.perturbation import graph_perturbation
    from qpert.exporter.references.eager import TorchReference
    from qpert.exporter.references.recording import InputMaker
    from qpert.exporter.references.reopening import reopened

    manifest = bundle.manifest
    family = find_family(manifest.family)
    with reopened(family, manifest, checkpoint) as opened:
        reference = TorchReference.open(family, opened, manifest.graphs, graph_perturbation(settings))
        maker = InputMaker(manifest.graphs, manifest.token_grid, manifest.tokenizer.vocab_size)
        made = {name: with_boxes(reference, maker, samples, manifest, name) for name in manifest.graphs}
    return tuple(made[case.graph].get(case.name, case) for case in samples.cases)


def with_boxes(
    reference: MarginReference, maker: InputMaker, samples: Samples, manifest: Manifest, name: str
) -> dict[str, Case]:
    """The cases of a graph that depend on the threshold, by name; none if it takes no boxes."""
    from qpert.exporter.references.recording import box_cases

    graph, tower = manifest.graphs[name], manifest.image_tower
    if not graph.takes_boxes:
        return {}
    features = next(tower.by_slot(case.expected)[IMAGE_TOKENS] for case in samples.cases if case.graph == tower.name)
    known = {case.name: case for case in samples.cases if case.graph == name}
    found = {}
    for kind, objects in box_cases(reference, maker, features, graph).items():
        if kind not in known:
            raise InputError(
                f"the samples have no case {kind!r} of graph {name!r}; export the bundle again", code="sample-missing"
            )
        inputs = known[kind].inputs | graph.bind(objects)
        found[kind] = Case(name, kind, inputs, reference.run(name, inputs))
    return found


def save_samples(samples: Samples, path: Path) -> None:
    from safetensors.numpy import save_file

    arrays, metadata = samples.to_arrays()
    save_file(arrays, str(path), metadata=metadata)
    path.chmod(0o644)  # safetensors writes files that only their owner can read
