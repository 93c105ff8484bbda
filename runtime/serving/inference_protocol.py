"""The raw graphs under `/v2`, in the Open Inference Protocol (KServe's V2) with its binary extension.

Sources: https://github.com/kserve/open-inference-protocol (`inference_rest.md`), and for tensors as bytes behind the
JSON, Triton's `extension_binary_data.md`. An error is `{"error": "text"}` there, and is so here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.responses import JSONResponse

from qpert.runtime.bundle.graph_spec import GraphSpec, TensorSpec
from qpert.runtime.errors import BundleError, InputError, QpertError
from qpert.runtime.serving.answers import json_answer
from qpert.runtime.serving.errors import RequestError
from qpert.runtime.serving.gate import refusal
from qpert.runtime.serving.requests import deadline_of, service_of, state_of, until_gone
from qpert.runtime.serving.service import Service

DATATYPES = {
    "FP32": "float32",
    "FP16": "float16",
    "FP64": "float64",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
NAMES = {dtype: name for name, dtype in DATATYPES.items()}
LENGTH = "Inference-Header-Content-Length"
"""The header that says how many bytes of the body are JSON; tensors follow."""
VERSION = "1"
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class ProtocolRoute(APIRoute):
    """Answers errors in the protocol's form."""

    def get_route_handler(self) -> Handler:
        answer = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await answer(request)
            except QpertError as error:
                return refusal(error, plain=True)

        return handler


router = APIRouter(prefix="/v2", route_class=ProtocolRoute)


@router.get("")
async def server() -> Response:
    """Name, version and extensions of the server."""
    return JSONResponse({"name": "qpert", "version": version("qpert"), "extensions": ["binary_tensor_data"]})


@router.get("/health/live")
async def live() -> Response:
    """200 as long as the process answers at all."""
    return Response()


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """200 where inference will be answered now."""
    return Response(status_code=200 if state_of(request).trouble is None else 503)


@router.get("/models/{model}")
@router.get("/models/{model}/versions/{number}")
async def metadata(request: Request, model: str, number: str = VERSION) -> Response:
    """Inputs and outputs of a graph; -1 is an axis of any length."""
    spec = spec_of(service_of(request), model, number)
    tensors = {
        name: [described(one) for one in found] for name, found in (("inputs", spec.inputs), ("outputs", spec.outputs))
    }
    return JSONResponse({"name": model, "versions": [VERSION], "platform": "onnxruntime_onnx", **tensors})


@router.get("/models/{model}/ready")
@router.get("/models/{model}/versions/{number}/ready")
async def model_ready(request: Request, model: str, number: str = VERSION) -> Response:
    """200 where a graph of that name will answer."""
    spec_of(service_of(request), model, number)
    return await ready(request)


@router.post("/models/{model}/infer")
@router.post("/models/{model}/versions/{number}/infer")
async def infer(request: Request, model: str, number: str = VERSION) -> Response:
    """Run a graph. Tensors are JSON numbers, or bytes after the JSON."""
    service = service_of(request)
    spec = spec_of(service, model, number)
    head, tail = split(await request.body(), request.headers.get(LENGTH))
    return await until_gone(request, inferred(service, spec, head, tail))


async def inferred(service: Service, spec: GraphSpec, head: dict[str, Any], tail: bytes) -> Response:
    inputs = await service.help(lambda: read_inputs(head, tail))
    wanted = wanted_outputs(head, spec)
    try:
        outputs = await service.infer(spec.name, inputs, deadline_of(service))
    except BundleError as error:  # numbers that the graph cannot take, such as token ids outside the vocabulary
        raise InputError(f"the graph cannot run on these inputs: {error}", code="graph-run") from error
    chosen = {name: (outputs[name], is_binary) for name, is_binary in wanted.items()}
    return await service.help(lambda: answer_of(spec.name, head.get("id"), chosen))


def spec_of(service: Service, model: str, number: str) -> GraphSpec:
    """Raises RequestError for a graph that is not there."""
    spec = service.encoder.sessions[model].spec if model in service.encoder.sessions else None
    if spec is None or number != VERSION:
        raise RequestError(
            f"there is no model {model!a} of version {number!a}; expected {', '.join(service.encoder.sessions)}, "
            f"version {VERSION}",
            code="model-unknown",
            status=404,
        )
    return spec


def described(tensor: TensorSpec) -> dict[str, object]:
    shape = [-1 if isinstance(length, str) else length for length in tensor.shape]
    return {"name": tensor.name, "datatype": NAMES[tensor.dtype], "shape": shape}


def split(body: bytes, length: str | None) -> tuple[dict[str, Any], bytes]:
    """The JSON of a request, and what follows it. Raises RequestError."""
    if length is not None and not (length.isdecimal() and int(length) <= len(body)):
        raise malformed(f"{LENGTH} is {length!a}, expected at most the {len(body)} bytes of the body")
    end = len(body) if length is None else int(length)
    try:
        head = json.loads(body[:end])
    except ValueError as error:
        raise malformed(f"the body is not JSON: {error}") from None
    if not isinstance(head, dict) or not isinstance(head.get("inputs"), list) or not head["inputs"]:
        raise malformed("the request has no list of inputs")
    return head, body[end:]


def malformed(what: str) -> RequestError:
    return RequestError(f"{what}; the Open Inference Protocol says what is expected", code="infer-request", status=400)


def read_inputs(head: Mapping[str, Any], tail: bytes) -> dict[str, np.ndarray]:
    """The arrays by name. Raises RequestError."""
    inputs: dict[str, np.ndarray] = {}
    start = 0
    for tensor in head["inputs"]:
        if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str) or tensor["name"] in inputs:
            raise malformed("an input has no name, or two have the same")
        name, shape = tensor["name"], tensor.get("shape")
        dtype = DATATYPES.get(str(tensor.get("datatype")))
        whole = isinstance(shape, list) and all(type(length) is int and length >= 0 for length in shape)
        if dtype is None or not isinstance(shape, list) or not whole:
            raise malformed(f"input {name!a} has the shape {shape!a} and datatype {tensor.get('datatype')!a}")
        size = parameters_of(tensor).get("binary_data_size")
        if size is None:
            array = from_numbers(name, tensor.get("data"), dtype)
        elif type(size) is int and 0 <= size <= len(tail) - start:
            array = from_bytes(name, tail[start : start + size], dtype)
            start += size
        else:
            raise malformed(f"input {name!a} has a binary_data_size of {size!a}, {len(tail) - start} bytes are left")
        if array.size != math.prod(shape):
            raise malformed(f"input {name!a} has {array.size} numbers, its shape is {shape}")
        inputs[name] = array.reshape(shape)
    return inputs


def parameters_of(values: Mapping[str, Any]) -> Mapping[str, Any]:
    found = values.get("parameters") or {}
    if not isinstance(found, dict):
        raise malformed("parameters are no object")
    return found


def from_numbers(name: str, data: object, dtype: str) -> np.ndarray:
    """Numbers of JSON, flat or nested as the shape is. A float in the place of a whole number is refused."""
    try:
        array = np.array(data)
        kinds = {"f": "iuf", "i": "iu", "u": "iu", "b": "b"}[np.dtype(dtype).kind]
        if array.size and array.dtype.kind not in kinds:
            raise ValueError
        limits = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else None
        if array.size and limits is not None and not (limits.min <= array.min() and array.max() <= limits.max):
            raise ValueError
        return array.reshape(-1).astype(dtype)
    except (ValueError, OverflowError):
        raise malformed(f"the data of input {name!a} are no array of {NAMES[dtype]}") from None


def from_bytes(name: str, data: bytes, dtype: str) -> np.ndarray:
    """Little-endian bytes."""
    try:
        return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype)
    except ValueError:
        raise malformed(f"the {len(data)} bytes of input {name!a} are no whole number of {NAMES[dtype]}") from None


def wanted_outputs(head: Mapping[str, Any], spec: GraphSpec) -> dict[str, bool]:
    """Which outputs are asked for, and whether as bytes; all where none is named. Raises RequestError."""
    all_binary = parameters_of(head).get("binary_data_output") is True
    named = head.get("outputs")
    if named is None:
        return dict.fromkeys(spec.output_names, all_binary)
    wanted: dict[str, bool] = {}
    for output in named if isinstance(named, list) else [None]:
        name = output.get("name") if isinstance(output, dict) else None
        if name not in spec.output_names:
            raise malformed(f"output {name!a} is asked for, the model has {', '.join(spec.output_names)}")
        wanted[name] = parameters_of(output or {}).get("binary_data", all_binary) is True
    return wanted


def answer_of(model: str, identity: object, outputs: Mapping[str, tuple[np.ndarray, bool]]) -> Response:
    """The answer: JSON, and the bytes of those outputs that are wanted so."""
    described_outputs: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for name, (array, is_binary) in outputs.items():
        entry: dict[str, Any] = {"name": name, "datatype": NAMES[str(array.dtype)], "shape": list(array.shape)}
        if is_binary:
            tail.append(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            entry["data"] = array.reshape(-1).tolist()
        described_outputs.append(entry)
    answer: dict[str, Any] = {"model_name": model, "model_version": VERSION, "outputs": described_outputs}
    if isinstance(identity, str):
        answer["id"] = identity
    if not tail:
        return json_answer(answer)
    head = json.dumps(answer, separators=(",", ":")).encode()
    headers = {LENGTH: str(len(head))}
    return Response(b"".join([head, *tail]), media_type="application/octet-stream", headers=headers)
