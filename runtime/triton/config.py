"""`config.pbtxt`: one model's configuration for Triton, as data and as text.

Source: `model_config.proto` of triton-inference-server/common, release 24.10 (server 2.51).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qpert.runtime.bundle.graph_spec import GraphSpec, TensorSpec
from qpert.runtime.errors import InputError

TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64", "int32": "TYPE_INT32",
         "uint8": "TYPE_UINT8", "string": "TYPE_STRING"}  # fmt: skip
QUEUE = 256
"""Requests that wait for a model; more are refused."""
QUEUE_SECONDS = 30
"""A request that has waited so long is refused, as by `qpert serve`."""


@dataclass(frozen=True)
class Tensor:
    """An input or output without its batch axis; -1 is an axis of any length. An optional input may be left out."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    optional: bool = False

    @classmethod
    def of(cls, spec: TensorSpec) -> Tensor:
        """A graph's tensor; its first axis is the batch.

        Raises:
            InputError: Triton has no such type.
        """
        if spec.dtype not in TYPES:
            raise InputError(
                f"tensor {spec.name} is {spec.dtype}, which Triton's clients cannot send; export the bundle with "
                "--precision fp32 or fp16",
                code="triton-dtype",
            )
        return cls(spec.name, spec.dtype, tuple(-1 if isinstance(axis, str) else axis for axis in spec.shape[1:]))

    def text(self) -> str:
        dims = ", ".join(map(str, self.dims))
        end = " optional: true" if self.optional else ""
        return f"{{ name: {quoted(self.name)} data_type: {TYPES[self.dtype]} dims: [ {dims} ]{end} }}"


@dataclass(frozen=True)
class Step:
    """A model of an ensemble; `inputs` and `outputs` are its tensors' names → names inside the ensemble."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    def text(self) -> str:
        maps = [f"input_map {{ key: {quoted(key)} value: {quoted(value)} }}" for key, value in self.inputs.items()]
        maps += [f"output_map {{ key: {quoted(key)} value: {quoted(value)} }}" for key, value in self.outputs.items()]
        return f"{{ model_name: {quoted(self.model)} model_version: -1 {' '.join(maps)} }}"


@dataclass(frozen=True)
class ModelConfig:
    """One model. `files`: engine by compute capability. `steps` make it an ensemble."""

    name: str
    backend: str
    most: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)
    file: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    on_gpu: bool = False

    def text(self) -> str:
        lines = [f"name: {quoted(self.name)}"]
        lines += ['platform: "ensemble"'] if self.steps else [f"backend: {quoted(self.backend)}"]
        lines += [f"max_batch_size: {self.most}"]
        lines += [f"input [\n  {joined(self.inputs)}\n]", f"output [\n  {joined(self.outputs)}\n]"]
        if self.file:
            lines += [f"default_model_filename: {quoted(self.file)}"]
        lines += [f"cc_model_filenames {{ key: {quoted(key)} value: {quoted(value)} }}"
                  for key, value in self.files.items()]  # fmt: skip
        lines += [f"parameters {{ key: {quoted(key)} value: {{ string_value: {quoted(value)} }} }}"
                  for key, value in self.parameters.items()]  # fmt: skip
        lines += [f"ensemble_scheduling {{ step [\n  {joined(self.steps)}\n] }}"] if self.steps else self._scheduling()
        return "\n".join(lines) + "\n"

    def _scheduling(self) -> list[str]:
        policy = f"max_queue_size: {QUEUE} default_timeout_microseconds: {QUEUE_SECONDS * 1_000_000}"
        return [
            f"dynamic_batching {{ default_queue_policy {{ {policy} timeout_action: REJECT }} }}",
            f"instance_group [ {{ kind: {'KIND_GPU' if self.on_gpu else 'KIND_CPU'} count: 1 }} ]",
        ]


def graph_inputs(graph: GraphSpec) -> tuple[Tensor, ...]:
    return tuple(Tensor.of(spec) for spec in graph.inputs)


def graph_outputs(graph: GraphSpec) -> tuple[Tensor, ...]:
    return tuple(Tensor.of(spec) for spec in graph.outputs)


def joined(items: Sequence[Tensor | Step]) -> str:
    return ",\n  ".join(item.text() for item in items)


def quoted(text: str) -> str:
    """A string of protobuf's text format, which quotes as JSON does."""
    return json.dumps(text)
