"""What Triton's python backend runs: each class is the `TritonPythonModel` of one model of the repository.

The host's work is the runtime's own, so that what a client sends is treated as `Retriever` treats it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.bundle.manifest import read_manifest
from qpert.runtime.bundle.roles import (
    BOX_WEIGHTS,
    IMAGE_TOKENS,
    IMAGE_VECTORS,
    OBJECT_MASKS,
    PAIR_SCORER,
    PIXELS,
    TOKEN_IDS,
    TOKEN_MASK,
)
from qpert.runtime.errors import BoxError, LimitError, QpertError
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import preprocess_images
from qpert.runtime.inputs.perturbation import box_inputs
from qpert.runtime.inputs.text import Tokenizer
from qpert.runtime.retrieval.query_sets import QuerySets, inputs_of_sets, sets_of_images
from qpert.runtime.serving.pictures import open_picture
from qpert.runtime.serving.settings import Limits
from qpert.runtime.sessions.onnx import OnnxRuntimeSession
from qpert.runtime.sessions.providers import find_provider
from qpert.runtime.triton.plan import BOX_COUNTS, BOXES, IMAGE, LENGTH_STEP, TEXT, batch_limit

Arrays = dict[str, npt.NDArray[Any]]


def triton() -> Any:
    """The module that Triton gives its python backend, and nobody else."""
    import triton_python_backend_utils  # type: ignore[import-not-found]

    return triton_python_backend_utils


class Model:
    """One model of the repository: `run` takes and gives arrays by name, for one request."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Called by Triton, once."""
        self.config = json.loads(arguments["model_config"])
        self.folder = Path(arguments["model_repository"]) / arguments["model_version"]
        self.manifest = read_manifest(self.folder)
        self.inputs = [tensor["name"] for tensor in self.config["input"]]
        self.open()

    def open(self) -> None:
        """What a model needs beside the manifest."""

    def run(self, arrays: Arrays) -> Arrays:
        raise NotImplementedError

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Called by Triton with the requests of a batch, each of which gets its answer, or its own error."""
        return [self._answered(request) for request in requests]

    def parameter(self, name: str) -> str:
        return str(self.config["parameters"][name]["string_value"])

    def _arrays(self, request: Any) -> Arrays:
        """Those inputs that the request has."""
        tensors = {name: triton().get_input_tensor_by_name(request, name) for name in self.inputs}
        return {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}

    def _answered(self, request: Any) -> Any:
        try:
            return response(self.run(self._arrays(request)))
        except QpertError as error:
            return refusal(error)


class Graph(Model):
    """A graph in ONNX Runtime. Requests that Triton has grouped, which all have one shape, are one call."""

    def open(self) -> None:
        graph = self.manifest.graphs[self.config["name"]]
        provider, threads = find_provider(self.parameter("provider")), int(self.parameter("threads"))
        path = self.folder / "model.onnx"
        self.session = OnnxRuntimeSession.open(path, graph, provider, threads=threads, spin=False)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        arrays = [self._arrays(request) for request in requests]
        counts = [len(one[self.inputs[0]]) for one in arrays]
        try:
            joined = {name: np.concatenate([one[name] for one in arrays]) for name in self.inputs}
            outputs = self.session.run(joined)
        except QpertError as error:
            return [refusal(error) for _ in requests]
        ends = np.cumsum(counts)
        return [
            response({name: value[end - count : end] for name, value in outputs.items()})
            for end, count in zip(ends.tolist(), counts, strict=True)
        ]


class TokenizeTexts(Model):
    """`text` [T, 1] → token ids and mask [T, L]; L is a multiple of LENGTH_STEP, so that requests share batches."""

    def open(self) -> None:
        spec = self.manifest.tokenizer
        self.tokenizer = Tokenizer.open(self.folder / Path(spec.file).name, spec, length_step=LENGTH_STEP)

    def run(self, arrays: Arrays) -> Arrays:
        tokens = self.tokenizer.encode(strings(arrays[TEXT]))
        return self.manifest.text_tower.bind({TOKEN_IDS: tokens.input_ids, TOKEN_MASK: tokens.attention_mask})


class TokenizeCandidates(TokenizeTexts):
    """`text` [I, T] → [I, T', L] for the pair scorer; T' is the next power of two, the last text repeated."""

    def run(self, arrays: Arrays) -> Arrays:
        texts, scorer = arrays[TEXT], self.manifest.graph(PAIR_SCORER)
        axis = scorer.input(TOKEN_IDS).shape[1]
        most = scorer.ranges[axis].max if isinstance(axis, str) else int(axis)
        if not 0 < texts.shape[1] <= most:
            raise LimitError(
                f"got {texts.shape[1]} texts for an image, expected 1 to {most}; send them in several requests",
                code="texts-limit",
            )
        padded = np.pad(texts, ((0, 0), (0, bucket(texts.shape[1], most) - texts.shape[1])), mode="edge")
        tokens = self.tokenizer.encode(strings(padded))
        shape = (*padded.shape, tokens.input_ids.shape[1])
        ids, mask = tokens.input_ids.reshape(shape), tokens.attention_mask.reshape(shape)
        return scorer.bind({TOKEN_IDS: ids, TOKEN_MASK: mask})


class PreprocessImages(Model):
    """`image` [B, 1], bytes of files, and `boxes` [B, O, 4] in pixels, rows of zeros for none → pixels, masks, weights.

    Masks and weights are padded to the next power of two boxes, so that requests share batches.
    """

    def run(self, arrays: Arrays) -> Arrays:
        pictures = [open_picture(data, f"picture {row}", Limits()) for row, data in enumerate(arrays[IMAGE][:, 0])]
        tower, head = self.manifest.image_tower, self.manifest.query_head
        found = tower.bind({PIXELS: preprocess_images(pictures, self.manifest.preprocessing)})
        if not head.takes_boxes:
            return found
        given = arrays.get(BOXES, np.zeros((len(pictures), 1, 4), np.float32))
        boxes = [
            boxes_of_rows(rows, picture.size, f"picture {number}")
            for number, (rows, picture) in enumerate(zip(given, pictures, strict=True))
        ]
        counts, most = [len(one) for one in boxes], head.ranges["O"].max
        if max(counts) > most:
            raise LimitError(
                f"a picture has {max(counts)} boxes, this bundle takes up to {most}; send the best ones",
                code="boxes-limit",
            )
        masks, weights = box_inputs(boxes, self.manifest.perturbation, self.manifest.token_grid)
        more = bucket(max(1, *counts), most) - masks.shape[1]
        masks, weights = np.pad(masks, ((0, 0), (0, more), (0, 0))), np.pad(weights, ((0, 0), (0, more)))
        return found | head.bind({OBJECT_MASKS: masks, BOX_WEIGHTS: weights}) | {BOX_COUNTS: np.array(counts)[:, None]}


class ImageQuerySets(Model):
    """A query set for each box: the query head, by way of Triton, sees an image once a set.

    Images with fewer sets repeat their last one, as `ImageFeatures.query_embeds` does.
    """

    def run(self, arrays: Arrays) -> Arrays:
        head, settings = self.manifest.query_head, self.manifest.perturbation
        by_slot = {spec.slot: arrays[spec.name] for spec in head.inputs}
        counts, set_boxes = sets_of_images([stand_in(int(n)) for n in arrays[BOX_COUNTS][:, 0]], settings)
        masks, weights = inputs_of_sets(by_slot[OBJECT_MASKS], by_slot[BOX_WEIGHTS], counts, set_boxes)
        tokens = by_slot[IMAGE_TOKENS][np.repeat(np.arange(len(counts)), counts)]
        most, vectors = batch_limit(head), head.output(IMAGE_VECTORS).name
        parts = [
            self._head({IMAGE_TOKENS: tokens[part], OBJECT_MASKS: masks[part], BOX_WEIGHTS: weights[part]}, vectors)
            for part in (slice(start, start + most) for start in range(0, len(tokens), most))
        ]
        return {vectors: QuerySets(np.concatenate(parts), counts, set_boxes).padded}

    def _head(self, slots: Arrays, vectors: str) -> npt.NDArray[np.float32]:
        backend, head = triton(), self.manifest.query_head
        tensors = [backend.Tensor(name, np.ascontiguousarray(array)) for name, array in head.bind(slots).items()]
        request = backend.InferenceRequest(model_name=head.name, requested_output_names=[vectors], inputs=tensors)
        answer = request.exec()
        if answer.has_error():
            raise QpertError(answer.error().message(), code="triton-model")
        return np.asarray(backend.get_output_tensor_by_name(answer, vectors).as_numpy())


def response(outputs: Arrays) -> Any:
    tensors = [triton().Tensor(name, np.ascontiguousarray(value)) for name, value in outputs.items()]
    return triton().InferenceResponse(tensors)


def refusal(error: QpertError) -> Any:
    """An error of one request's own: Triton answers 400, or INVALID_ARGUMENT."""
    found = triton().TritonError(f"{error.code}: {error}", triton().TritonError.INVALID_ARG)
    return triton().InferenceResponse(error=found)


def strings(cells: npt.NDArray[Any]) -> list[str]:
    """Bytes of Triton's strings as text; what is no UTF-8 is refused by the tokenizer."""
    return [cell.decode("utf-8", "surrogateescape") for cell in cells.reshape(-1)]


def bucket(count: int, most: int) -> int:
    """The next power of two, but no more than `most`."""
    return min(most, 1 << max(0, count - 1).bit_length())


def boxes_of_rows(rows: npt.NDArray[np.float32], size: tuple[int, int], name: str) -> Boxes:
    """Rows of x1, y1, x2, y2 without those that are all zero. Raises BoxError, naming the picture."""
    given = rows.astype(np.float64)
    try:
        return Boxes(given[(given != 0).any(axis=1)], size)
    except BoxError as error:
        raise BoxError(f"{name}: {error}", code=error.code) from error


def stand_in(count: int) -> Boxes | None:
    """`count` placeholder boxes: `sets_of_images` needs only their number."""
    return Boxes(np.tile([0.0, 0.0, 1.0, 1.0], (count, 1)), (1, 1)) if count else None
