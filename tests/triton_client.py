"""NVIDIA's own clients, run with the Python of `.cache/triton`: JSON on stdin, JSON on stdout, arrays as .npz.

    python triton_client.py HTTP_PORT GRPC_PORT [ARRAYS.npz]   < request

{"index": true} asks for the models. {"calls": [{"model", "inputs": {name: key in ARRAYS or list of strings},
"outputs"}]} sends each call by HTTP and by gRPC; answers come in `http` and `grpc`: the place of each output in
ARRAYS.out.npz, or the error. {"parallel": N} sends them from N threads at once. {"configs": [PATH]} parses files as
protobuf text.
"""

import base64
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype


def array_of(value, arrays):
    if isinstance(value, str):
        return arrays[value]
    return np.array([[base64.b64decode(cell) for cell in row] for row in value], object)


def send(module, client, call, arrays):
    inputs = []
    for name, value in call["inputs"].items():
        array = array_of(value, arrays)
        tensor = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    outputs = [module.InferRequestedOutput(name) for name in call["outputs"]]
    try:
        answer = client.infer(call["model"], inputs, outputs=outputs)
    except InferenceServerException as error:
        return {"error": error.message(), "status": str(error.status())}
    return {name: answer.as_numpy(name) for name in call["outputs"]}


def parsed(paths):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return {path: text_format.Parse(Path(path).read_text(), model_config_pb2.ModelConfig()).name for path in paths}


def main():
    request = json.load(sys.stdin)
    if "configs" in request:
        return print(json.dumps({"configs": parsed(request["configs"])}))
    over_http = http.InferenceServerClient(f"127.0.0.1:{sys.argv[1]}", concurrency=16, network_timeout=300)
    over_grpc = grpc.InferenceServerClient(f"127.0.0.1:{sys.argv[2]}")
    if request.get("index"):
        return print(json.dumps({"index": over_http.get_model_repository_index()}))
    arrays = dict(np.load(sys.argv[3]))
    results, kept = {}, {}
    for kind, module, client in (("http", http, over_http), ("grpc", grpc, over_grpc)):
        with ThreadPoolExecutor(request.get("parallel", 1)) as pool:
            calls = request["calls"]
            if kind == "http" and request.get("parallel", 1) > 1:
                continue  # its client is not made for threads
            answers = list(pool.map(lambda call: send(module, client, call, arrays), calls))  # noqa: B023
        results[kind] = []
        for number, answer in enumerate(answers):
            found = {}
            for name, value in answer.items():
                if isinstance(value, np.ndarray):
                    found[name] = f"{kind}-{number}-{name}"
                    kept[found[name]] = value
                else:
                    found[name] = value
            results[kind].append(found)
    statistics = over_grpc.get_inference_statistics(as_json=True)
    np.savez(sys.argv[3].removesuffix(".npz") + ".out.npz", **kept)
    return print(json.dumps(results | {"statistics": statistics["model_stats"]}))


if __name__ == "__main__":
    main()
