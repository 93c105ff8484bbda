"""An image's boxes as catalogues and stores keep them: JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from qpert.runtime.inputs.boxes import Boxes


def boxes_to_json(boxes: Boxes | None) -> str | None:
    if boxes is None:
        return None
    return json.dumps(
        {
            "xyxy": boxes.xyxy.tolist(),
            "size": list(boxes.size),
            "scores": None if boxes.scores is None else boxes.scores.tolist(),
            "labels": None if boxes.labels is None else list(boxes.labels),
        }
    )


def boxes_from_json(text: str | None) -> Boxes | None:
    if text is None:
        return None
    values: dict[str, Any] = json.loads(text)
    xyxy = np.array(values["xyxy"], np.float64).reshape(-1, 4)
    scores = None if values["scores"] is None else np.array(values["scores"], np.float64)
    labels = None if values["labels"] is None else tuple(values["labels"])
    return Boxes(xyxy, tuple(values["size"]), scores=scores, labels=labels)
