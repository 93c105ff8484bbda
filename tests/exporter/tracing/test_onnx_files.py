"""ONNX files: what is written, and that a graph which is not as declared is found."""

import sys
from dataclasses import replace

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from qpert.exporter.tracing.onnx_files import check_graph, describe, distinct, recipe_bytes, write_graphs
from qpert.exporter.tracing.readable import GraphError, open_graph, require_onnxruntime
from qpert.exporter.tracing.weights import Recipe, weighted_graph
from qpert.runtime.bundle.graph_spec import AxisRange, GraphSpec, TensorSpec
from qpert.runtime.errors import QpertError, UnavailableError
from qpert.runtime.progress import Silent

SPEC = GraphSpec(
    "text",
    "text_tower",
    "onnx/text.onnx",
    (TensorSpec("x", "token_ids", "float32", ("T", 3)),),
    (TensorSpec("y", "text_vectors", "float32", ("T", 2)),),
    {"T": AxisRange(1, 4)},
)


def model(output=("T", 2), op="MatMul", ir_version=10):
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", ["T", 3]), ("w", [3, 2]))]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)]
    graph = helper.make_graph([helper.make_node(op, ["x", "w"], ["y"])], "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=ir_version)


class Source:
    def get(self, name):
        return torch.ones(3, 2)


def write(folder, **options):
    graphs = {name: weighted_graph(model(**options), {"w": "w"}) for name in ("text", "itm")}
    write_graphs(folder / "onnx", graphs, dict.fromkeys(graphs, "qformer.data"), Source(), Silent())
    return folder / "onnx" / "text.onnx"


def test_graphs_that_share_a_weight_share_its_place_in_one_file(tmp_path):
    write(tmp_path)
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["itm.onnx", "qformer.data", "text.onnx"]
    assert (tmp_path / "onnx" / "qformer.data").stat().st_size == 24
    for name in ("text", "itm"):
        (tensor,) = onnx.load_model(tmp_path / "onnx" / f"{name}.onnx", load_external_data=False).graph.initializer
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place == {"location": "qformer.data", "offset": "0", "length": "24"}


def test_a_graph_that_is_as_declared_passes(tmp_path):
    check_graph(write(tmp_path), SPEC)


@pytest.mark.parametrize(
    "spec",
    [
        replace(SPEC, inputs=(TensorSpec("z", "token_ids", "float32", ("T", 3)),)),
        replace(SPEC, inputs=(TensorSpec("x", "token_ids", "float16", ("T", 3)),)),
        replace(SPEC, outputs=(TensorSpec("y", "text_vectors", "float32", ("T", 3)),)),
        replace(SPEC, outputs=(TensorSpec("y", "text_vectors", "float32", ("B", 2)),)),
        replace(SPEC, outputs=(TensorSpec("y", "text_vectors", "float32", ("T", 2, 1)),)),
        replace(SPEC, outputs=()),
    ],
)
def test_a_graph_that_is_not_as_declared_is_an_error_with_both(tmp_path, spec):
    with pytest.raises(GraphError, match=r"graph 'text' has .*, expected .* as declared") as caught:
        check_graph(write(tmp_path), spec)
    assert caught.value.code == "graph-declaration"
    assert isinstance(caught.value, QpertError)


def test_an_axis_that_was_fixed_by_tracing_is_found(tmp_path):
    path = write(tmp_path)
    loaded = onnx.load_model(path, load_external_data=False)
    for value in (*loaded.graph.input, *loaded.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save_model(loaded, path)
    with pytest.raises(GraphError, match=r"\[4, 3\].* expected .*\['T', 3\]"):
        check_graph(path, SPEC)


def test_an_operator_that_is_not_standard_is_found(tmp_path):
    path = write(tmp_path)
    loaded = onnx.load_model(path, load_external_data=False)
    loaded.graph.node[0].op_type = "QueryMap"
    onnx.save_model(loaded, path)
    with pytest.raises(onnx.checker.ValidationError, match="QueryMap"):
        check_graph(path, SPEC)


def changed(path, change):
    loaded = onnx.load_model(path, load_external_data=False)
    change(loaded)
    onnx.save_model(loaded, path)
    return path


def test_graphs_are_written_in_the_ir_version_that_the_lowest_onnx_runtime_reads(tmp_path):
    written = onnx.load_model(write(tmp_path, ir_version=12), load_external_data=False)
    assert (written.ir_version, [(o.domain, o.version) for o in written.opset_import]) == (10, [("", 20)])


def newer_ir(loaded):
    loaded.ir_version = 11


def newer_opset(loaded):
    loaded.opset_import[0].version = 23


def other_domain(loaded):
    loaded.opset_import.add(domain="com.microsoft", version=1)


@pytest.mark.parametrize("change", [newer_ir, newer_opset, other_domain])
def test_versions_beyond_the_lowest_onnx_runtime_are_refused(tmp_path, change):
    # observed with 1.22.0: "max supported IR version: 10", "official support for domain ai.onnx is till opset 22"
    with pytest.raises(GraphError) as caught:
        check_graph(changed(write(tmp_path), change), SPEC)
    assert caught.value.code == "graph-version"


def test_a_graph_that_onnx_runtime_cannot_open_is_an_error(tmp_path):
    path = write(tmp_path)
    (path.parent / "qformer.data").write_bytes(b"short")
    with pytest.raises(GraphError) as caught:
        open_graph(path, "text")
    assert caught.value.code == "graph-unreadable"


def test_a_bfloat16_graph_has_no_kernels_on_the_cpu_and_is_accepted(tmp_path):
    def in_bfloat16(loaded):
        for value in (*loaded.graph.input, *loaded.graph.output):
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
        loaded.graph.initializer[0].data_type = TensorProto.BFLOAT16
        loaded.graph.initializer[0].external_data[2].value = "12"

    open_graph(changed(write(tmp_path), in_bfloat16), "text")


def test_sizes_are_counted_in_the_recipes_own_dtype():
    sizes = {TensorProto.FLOAT: 24, TensorProto.FLOAT16: 12, TensorProto.BFLOAT16: 12}
    assert {kind: recipe_bytes(Recipe("parameter", "w", kind, (3, 2))) for kind in sizes} == sizes
    assert recipe_bytes(Recipe("parameter", "w", TensorProto.FLOAT, ())) == 4


def test_what_several_graphs_share_counts_once():
    graphs = {name: weighted_graph(model(), {"w": "w"}) for name in ("text", "itm")}
    assert len(distinct(graphs)) == 1


def test_a_value_is_described_by_name_dtype_and_shape():
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["T", 3])
    assert describe(value) == ("x", "float16", ["T", 3])


def test_without_onnx_runtime_an_export_is_refused_before_it_begins(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnavailableError) as caught:
        require_onnxruntime()
    assert (caught.value.code, caught.value.exit_code) == ("onnxruntime-missing", 3)
