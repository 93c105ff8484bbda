"""The passes on toy graphs; what the lowering computes is tested in test_lowering.py."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from qpert.graphs import passes
from qpert.graphs.passes import PASSES, drop_unused_domains, run_passes, strip_traces
from qpert.graphs.perturbation.placeholder import DOMAIN, OPERATOR


def toy(nodes, *, domains=("",), inputs=(("x", [2, 3]),), outputs=(("y", [2, 3]),)):
    def values(described):
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in described]

    graph = helper.make_graph(nodes, "toy", values(inputs), values(outputs))
    opsets = [helper.make_opsetid(domain, 20 if not domain else 1) for domain in domains]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(graph, **inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(
        gs.export_onnx(graph).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)


X = np.array([[1.0, -2.0, 3.0], [0.0, 5.0, -6.0]], np.float32)


def test_what_the_tracer_wrote_for_debugging_is_dropped_and_the_result_stays():
    model = toy([helper.make_node("Relu", ["x"], ["y"], doc_string="/home/me/model.py")])
    model.graph.doc_string = model.doc_string = "traced by /home/me/model.py"
    for place in (model, model.graph, model.graph.node[0]):
        place.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File /home/me/model.py, line 7")
    stripped = strip_traces(gs.import_onnx(model))
    assert b"/home/me" not in gs.export_onnx(stripped).SerializeToString()
    np.testing.assert_array_equal(run(stripped, x=X)[0], np.maximum(X, 0))


def test_an_operator_set_that_nothing_uses_is_not_imported():
    graph = gs.import_onnx(toy([helper.make_node("Relu", ["x"], ["y"])], domains=("", "qpert", "other")))
    assert [imported.domain for imported in gs.export_onnx(drop_unused_domains(graph)).opset_import] == [""]


def test_an_operator_set_that_is_used_stays_imported():
    node = helper.make_node("Twice", ["x"], ["y"], domain="other")
    graph = gs.import_onnx(toy([node], domains=("", "qpert", "other")))
    kept = {imported.domain for imported in gs.export_onnx(drop_unused_domains(graph)).opset_import}
    assert kept == {"", "other"}


def test_the_placeholder_is_gone_after_all_passes_and_the_graph_is_standard_onnx():
    shapes = {"keys": [2, 1, 2, 5, 4], "masks": [2, 3, 5], "weights": [2, 3]}
    node = helper.make_node(OPERATOR, list(shapes), ["y"], domain=DOMAIN, threshold=0.95)
    model = toy([node], domains=("", DOMAIN), inputs=shapes.items(), outputs=[("y", [2, 1, 2, 4, 4])])
    graph = run_passes(gs.import_onnx(model))
    assert {node.domain or "" for node in graph.nodes} == {""}
    lowered = gs.export_onnx(graph)
    onnx.checker.check_model(lowered, full_check=True)
    assert [imported.domain for imported in lowered.opset_import] == [""]
    rng = np.random.default_rng(0)
    inputs = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    (zero,) = run(graph, **(inputs | {"weights": np.zeros((2, 3), np.float32)}))
    np.testing.assert_array_equal(zero, np.broadcast_to(np.eye(4, dtype=np.float32), (2, 1, 2, 4, 4)))


def test_a_graph_without_the_placeholder_is_left_as_it_is():
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Add", ["r", "x"], ["y"])]
    graph = run_passes(gs.import_onnx(toy(nodes)))
    assert [node.op for node in graph.nodes] == ["Relu", "Add"]
    np.testing.assert_array_equal(run(graph, x=X)[0], np.maximum(X, 0) + X)


def test_passes_run_in_their_order_each_followed_by_clean_up(monkeypatch):
    seen = []

    def leave_a_dead_node(graph):
        seen.append("first")
        graph.nodes.append(gs.Node("Neg", inputs=[graph.inputs[0]], outputs=[gs.Variable("dead", np.float32)]))
        return graph

    def look(graph):
        seen.append([node.op for node in graph.nodes])
        return graph

    monkeypatch.setattr(passes, "PASSES", (leave_a_dead_node, look))
    run_passes(gs.import_onnx(toy([helper.make_node("Relu", ["x"], ["y"])])))
    assert seen == ["first", ["Relu"]]


def test_the_lowering_comes_before_its_domain_is_dropped():
    names = [graph_pass.__name__ for graph_pass in PASSES]
    assert names.index("lower_query_map") < names.index("drop_unused_domains")
