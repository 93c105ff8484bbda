"""What a gallery was made with: the bundle's identity, the perturbation settings, and the sizes that follow."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.bundle.roles import IMAGE_TOKENS, IMAGE_VECTORS
from qpert.runtime.errors import GalleryError
from qpert.runtime.retrieval.encoder import Encoder

FeatureMode = Literal["stored", "recomputed", "none"]
FEATURE_MODES: tuple[FeatureMode, ...] = ("stored", "recomputed", "none")
GRAPH_FOLDER = "onnx/"


def bundle_identity(manifest: Manifest) -> str:
    """SHA-256 over what decides features and scores: graph files with their weights, tokenizer, preprocessing.

    Reports, recorded samples, engines and dates do not count: a bundle that is verified again stays the same bundle.
    Nor do host graphs: what they compute follows from the preprocessing here, and from the perturbation settings, which
    are compared by themselves.
    """
    host = {graph.file for graph in manifest.host_graphs.values()}
    deciding = {
        name: digest
        for name, digest in manifest.files.items()
        if (name.startswith(GRAPH_FOLDER) and name not in host) or name == manifest.tokenizer.file
    }
    document = {
        "files": deciding,
        "max_length": manifest.tokenizer.max_length,
        "preprocessing": without_squash(manifest.preprocessing.to_dict()),
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def without_squash(preprocessing: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 knew no other fit than a squash and did not name it: galleries made then stay valid."""
    return {key: value for key, value in preprocessing.items() if (key, value) != ("fit", "squash")}


def usual_features(encoder: Encoder) -> FeatureMode:
    """What a gallery keeps of an image where nobody says: features are for the pair scorer alone."""
    return "stored" if encoder.reranks else "none"


@dataclass(frozen=True)
class GallerySpec:
    """Fixed when a gallery is made. Q queries of E numbers; N tokens of C numbers in `feature_dtype`."""

    identity: str
    bundle: str
    checkpoint: str
    perturbation: dict[str, Any]
    features: FeatureMode
    queries: int
    width: int
    tokens: int
    channels: int
    feature_dtype: str
    has_masks: bool

    @classmethod
    def of(cls, encoder: Encoder, features: FeatureMode | None = None) -> GallerySpec:
        """`features` None: stored where the bundle can re-rank, none where nobody would read them."""
        features = features or usual_features(encoder)
        if features not in FEATURE_MODES:
            raise GalleryError(
                f"features is {features!r}; expected one of {', '.join(FEATURE_MODES)}", code="feature-mode"
            )
        manifest = encoder.manifest
        _, queries, width = manifest.query_head.output(IMAGE_VECTORS).shape
        image_tokens = manifest.image_tower.output(IMAGE_TOKENS)
        _, tokens, channels = image_tokens.shape
        scorer = manifest.pair_scorer
        return cls(
            identity=bundle_identity(encoder.manifest),
            bundle=str(encoder.bundle.folder.resolve()),
            checkpoint=encoder.manifest.checkpoint.name,
            perturbation=encoder.perturbation.to_dict(),
            features=features,
            queries=int(queries),
            width=int(width),
            tokens=int(tokens),
            channels=int(channels),
            feature_dtype=image_tokens.dtype,
            has_masks=scorer is not None and scorer.takes_boxes,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> GallerySpec:
        return cls(**json.loads(text))

    def require_identity(self, bundle: Bundle, gallery: object) -> None:
        """Raises GalleryError unless `bundle` is the one that made this gallery, or a copy of it."""
        found = bundle_identity(bundle.manifest)
        if self.identity != found:
            raise GalleryError(
                f"the gallery {gallery} was made with the bundle {self.bundle} (checkpoint {self.checkpoint}, identity "
                f"{self.identity[:12]}), now {bundle.folder} ({bundle.manifest.checkpoint.name}, {found[:12]}) is "
                "used; use the bundle that made it, or index the images into a new gallery",
                code="gallery-other-bundle",
            )

    def require(self, encoder: Encoder, gallery: object) -> None:
        """Raises GalleryError unless `encoder` gives the features that this gallery holds."""
        self.require_identity(encoder.bundle, gallery)
        mine, theirs = self.perturbation, encoder.perturbation.to_dict()
        differing = [key for key in mine if key != "semantics" and mine[key] != theirs.get(key)]  # a label, no setting
        if differing:
            differences = ", ".join(f"{key} {mine[key]!r} (now {theirs.get(key)!r})" for key in differing)
            raise GalleryError(
                f"the gallery {gallery} was made with other perturbation settings: {differences}; "
                "use those, or index the images into a new gallery",
                code="gallery-other-perturbation",
            )
