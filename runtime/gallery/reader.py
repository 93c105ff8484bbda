"""Reading a gallery: names, query embeddings and features by row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.bundle.folder import HashMemory
from qpert.runtime.errors import GalleryError, InputError
from qpert.runtime.filters.metadata import Metadata
from qpert.runtime.filters.parsing import as_condition
from qpert.runtime.filters.tree import Condition
from qpert.runtime.gallery.box_json import boxes_from_json
from qpert.runtime.gallery.catalogue import (
    Catalogue,
    ImageRecord,
    blocks_digest,
    damaged_block,
    open_catalogue,
    text_column,
    vector_columns,
)
from qpert.runtime.gallery.fields import read_fields, rows_where
from qpert.runtime.gallery.files import check_unchanged
from qpert.runtime.gallery.hits import MatchedBox
from qpert.runtime.gallery.scan import Codes, Nearest, nearest
from qpert.runtime.gallery.search import TextGallery
from qpert.runtime.gallery.shards import ShardReader
from qpert.runtime.inputs.arguments import as_path, as_rows, kind_of
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.features import Floats, ImageFeatures
from qpert.runtime.retrieval.query_sets import QuerySets, set_rows, sets_of_images, starts_of

Rows = Sequence[int] | npt.NDArray[np.int64]


class StoredGallery:
    """A gallery on disk, as it was when it was opened. A context manager; several may be open while one is indexing.

    Rows are numbered 0…n−1 in the order in which images were added (deleted ones do not count).

    A pickled or copied gallery opens the same files again and shows the same images. Where another process compacts
    the gallery, what was not read before is gone: a GalleryError of code `gallery-compacted` says to open it again.
    """

    _STATE = (
        *("_encoder", "spec", "_generation", "_records", "_sets", "_texts", "_columns", "_blocks", "_shards"),
        *("_fields", "_physical"),
    )
    """What a copy takes along; the rest is read again."""

    def __init__(self, catalogue: Catalogue, encoder: Encoder | None) -> None:
        """Use `open` or `open_vectors`. All but vectors and features is read here; the catalogue is not kept open."""
        self.folder = catalogue.folder
        self._encoder = encoder
        self.spec = catalogue.spec
        self._generation = catalogue.generation
        self._records = catalogue.images()
        self._sets = catalogue.sets()
        self._texts = catalogue.texts()
        self._fields = read_fields(catalogue)
        self._columns = {column.name: column for column in (*vector_columns(self.spec), text_column(self.spec))}
        self._blocks = {name: catalogue.blocks(name) for name in self._columns}
        self._shards = ShardReader(self.folder, catalogue.shards())
        self._physical = np.array([record.row for record in self._records], np.int64)
        self._maps: dict[str, npt.NDArray[Any]] = {}

    @classmethod
    def open(cls, folder: str | Path, encoder: Encoder) -> StoredGallery:
        """Open what has been committed so far, to be used with `encoder`.

        Raises:
            GalleryError: no gallery, a newer schema, altered, or made with another bundle or perturbation settings.
        """
        if not isinstance(encoder, Encoder):
            raise InputError(
                f"encoder is a {kind_of(encoder)}; expected retriever.encoder, or use retriever.open_gallery(folder)",
                code="encoder-kind",
            )
        folder = as_path(folder, "the gallery")
        gallery = None
        while gallery is None:
            gallery = cls._open_once(folder, encoder)
        return gallery

    @classmethod
    def open_vectors(cls, folder: Path) -> StoredGallery:
        """Open it without a bundle, for vectors and metadata: nothing is encoded again, and nobody checks that queries
        were encoded with the bundle that made it. Raises GalleryError as `open`."""
        gallery = None
        while gallery is None:
            gallery = cls._open_once(folder, None)
        return gallery

    @classmethod
    def _open_once(cls, folder: Path, encoder: Encoder | None) -> StoredGallery | None:
        """None where the gallery was compacted between the reading of its catalogue and of its files."""
        with closing(open_catalogue(folder)) as catalogue:
            with catalogue.snapshot():
                gallery = cls(catalogue, encoder)
            if encoder is not None:
                gallery.require(encoder)
            try:
                with gallery._compaction_noticed():
                    gallery._check_columns()
            except GalleryError as error:
                if error.code != "gallery-compacted":
                    raise
                return None
        return gallery

    @property
    def encoder(self) -> Encoder:
        """What it was opened with. Raises InputError where that was none (`open_vectors`)."""
        if self._encoder is None:
            raise InputError(
                f"the gallery {self.folder} was opened without a bundle, for its vectors alone; use "
                "retriever.open_gallery(folder)",
                code="encoder-kind",
            )
        return self._encoder

    @cached_property
    def images(self) -> tuple[str, ...]:
        """Names in row order."""
        return tuple(record.name for record in self._records)

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """The images' files in row order, as they were when indexed."""
        return tuple(Path(record.path) for record in self._records)

    @property
    def title(self) -> str:
        """What reports call it."""
        return self.folder.name

    def picture_of(self, name: str) -> tuple[Path, Boxes | None]:
        """An image's file and boxes, by its name."""
        row = self._row_of_name[name]
        return self.paths[row], self.boxes_of(row)

    def __len__(self) -> int:
        return len(self._records)

    @cached_property
    def query_sets(self) -> QuerySets:
        """The query sets of all images, read-only; mapped from the disk, so what is not touched costs no memory (a
        gallery with deleted images that was not compacted is copied)."""
        if len(self._sets) == len(self):
            return QuerySets(self._map("query_embeds"), self._sets, self._boxes_of_sets(self._records))
        return self._sets_of(self._records)

    @property
    def query_embeds(self) -> npt.NDArray[np.float32]:
        """float32 [n, Q, E], mapped; with reduction `each` [n, S·Q, E], a copy (`QuerySets.padded`)."""
        return self.query_sets.padded

    def itc_scores(self, text_embeds: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """ITC scores float32 [n, T] of all images with T texts [T, E]."""
        return self.query_sets.itc_scores(text_embeds)

    @property
    def texts(self) -> tuple[str, ...]:
        """The captions that images were indexed with, in order; empty where there were none."""
        return tuple(text for _, _, text in self._texts)

    @cached_property
    def image_of_text(self) -> npt.NDArray[np.int64]:
        """int64 [m]: the row of each caption's image."""
        owners = np.array([image for _, image, _ in self._texts], np.int64)
        return np.searchsorted(self._physical, owners)

    @cached_property
    def text_embeds(self) -> npt.NDArray[np.float32]:
        """float32 [m, E] of the captions."""
        return self._map("text_embeds")[np.array([row for row, _, _ in self._texts], np.int64)]

    def captions(self, where: str | Condition | None = None) -> TextGallery:
        """The captions to search for an image; with `where`, those of images of which it is true."""
        if where is None:
            return self._all_captions
        return self._captions_of(np.flatnonzero(np.isin(self.image_of_text, self.rows_where(where))))

    @cached_property
    def _all_captions(self) -> TextGallery:
        return self._captions_of(np.arange(len(self.image_of_text)))

    def _captions_of(self, rows: npt.NDArray[np.int64]) -> TextGallery:
        owners = self.image_of_text
        texts, images = self.texts, self.images
        embeds = self.text_embeds[rows] if len(owners) else np.empty((0, self.spec.width), np.float32)
        return TextGallery(tuple(texts[row] for row in rows), embeds, tuple(images[owners[row]] for row in rows))

    def nearest(
        self,
        text_embeds: npt.NDArray[np.float32],
        count: int,
        *,
        exact: bool = False,
        where: str | Condition | None = None,
    ) -> Nearest:
        """The best `count` images for each of T texts by ITC, of those of which `where` is true; see
        `qpert.runtime.gallery.scan.nearest`."""
        alive = np.zeros(len(self._sets), bool)
        alive[self._physical] = True
        if where is not None:
            alive &= self._where(where)
        codes = Codes(self._map("codes"), self._map("code_stats"))
        vectors, counts = self._map("query_embeds"), self._sets
        found = nearest(vectors, text_embeds, count, counts=counts, codes=codes, alive=alive, exact=exact)
        return Nearest(np.searchsorted(self._physical, found.rows), found.scores)

    def rows_where(self, where: str | Condition) -> npt.NDArray[np.int64]:
        """int64 [m]: the rows of which a filter is true; of a gallery's metadata as they are now.

        Raises InputError for a filter that cannot be read, GalleryError where the gallery was compacted since.
        """
        return np.flatnonzero(self._where(where)[self._physical])

    @cached_property
    def metadata(self) -> tuple[Metadata, ...]:
        """What is known of each image besides its pixels, in row order, as it was when the gallery was opened."""
        return tuple(self._fields.get(record.row, {}) for record in self._records)

    @cached_property
    def metadata_keys(self) -> tuple[str, ...]:
        """What a filter can be about, in order."""
        return tuple(sorted({key for values in self.metadata for key in values}))

    def _where(self, where: str | Condition) -> npt.NDArray[np.bool_]:
        """bool [rows], dead ones too. The catalogue is asked, which has an index; a row's image never changes while
        the generation stays."""
        condition, chosen = as_condition(where), np.zeros(len(self._sets), bool)
        assert condition is not None
        with closing(open_catalogue(self.folder)) as catalogue, catalogue.snapshot():
            if catalogue.generation != self._generation:
                raise self._compacted()
            rows = rows_where(catalogue, condition)
        chosen[rows[rows < len(chosen)]] = True
        return chosen

    def features_of(self, rows: Rows) -> ImageFeatures:
        """The features of some images, in that order (a row may repeat).

        Reads only those records; `image_embeds` [B, N, C] in the bundle's feature dtype, masks and weights where the
        bundle perturbs ITM. With `recomputed` features the images are encoded again from their files.

        Raises GalleryError for a damaged shard (named, with the remedy), ImageError for a file that has gone.
        """
        records = [self._records[row] for row in as_rows(rows, len(self))]
        sets = self._sets_of(records)
        if self.spec.features == "none":
            raise GalleryError(
                f"{self.folder} was indexed with --features none, so its images cannot be re-ranked; search with "
                "rerank 0, or index again with --features stored",
                code="gallery-without-features",
            )
        if self.spec.features == "recomputed":
            again = self._encoded_again(records)
            return ImageFeatures(sets, again.image_embeds, again.object_masks, again.box_weights)
        return self._stored(records, sets)

    def matched_box(self, row: int, text_embed: npt.NDArray[np.float32]) -> MatchedBox | None:
        """Which box of an image matches a text [E] best; None without a query set for each box."""
        if not self._made.splits_boxes:
            return None
        (number,) = as_rows([row], len(self))
        index = self._sets_of([self._records[number]]).matched_box(0, text_embed)
        return None if index is None else MatchedBox.of(index, self.boxes_of(number))

    @property
    def has_boxes(self) -> bool:
        """Whether any image was indexed with boxes."""
        return any(record.boxes is not None and '"xyxy": []' not in record.boxes for record in self._records)

    def boxes_of(self, row: int) -> Boxes | None:
        """The boxes that an image was indexed with."""
        (number,) = as_rows([row], len(self))
        return boxes_from_json(self._records[number].boxes)

    def row_of(self, name: str) -> int | None:
        """The row of an image, or None where there is no such image."""
        return self._row_of_name.get(name)

    def record(self, row: int) -> ImageRecord:
        """What the catalogue says of an image."""
        (number,) = as_rows([row], len(self))
        return self._records[number]

    def sets_of(self, rows: Rows) -> QuerySets:
        """The query sets of some images, in that order."""
        return self._sets_of([self.record(row) for row in rows])

    @cached_property
    def _row_of_name(self) -> dict[str, int]:
        return {record.name: row for row, record in enumerate(self._records)}

    def require(self, encoder: Encoder) -> None:
        """Raises GalleryError unless `encoder` is of the bundle and settings that made this gallery."""
        self.spec.require(encoder, self.folder)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name in self._STATE}
        return {**state, "folder": self.folder.absolute()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _maps={})
        with self._compaction_noticed():
            self._check_columns()

    @contextmanager
    def _compaction_noticed(self) -> Iterator[None]:
        """Says of files that are missing because the gallery was compacted that it was compacted, not damaged."""
        try:
            yield
        except GalleryError as error:
            with closing(open_catalogue(self.folder)) as catalogue:
                if catalogue.generation == self._generation:
                    raise
            raise self._compacted() from error

    def _compacted(self) -> GalleryError:
        return GalleryError(
            f"the gallery {self.folder} was compacted by another process since it was opened here, and the files "
            "of before are gone; open it again (nothing is damaged)",
            code="gallery-compacted",
        )

    def close(self) -> None:
        """Give files back. What was read stays valid."""
        self._shards.close()
        self._maps.clear()

    def __enter__(self) -> StoredGallery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _path(self, name: str) -> Path:
        return self._columns[name].file(self.folder, self._generation)

    def _map(self, name: str) -> npt.NDArray[Any]:
        """A column's committed rows, mapped from its file."""
        if name not in self._maps:
            rows = max((block.first + block.rows for block in self._blocks[name]), default=0)
            with self._compaction_noticed():
                self._maps[name] = self._columns[name].map(self._path(name), rows)
        return self._maps[name]

    def _check_columns(self) -> None:
        """Hash what was not found to be right before; raises GalleryError for what was altered."""
        memory = HashMemory.load()
        for name, blocks in self._blocks.items():
            self._map(name)
            if not blocks or memory.knows(self._path(name), blocks_digest(blocks)):
                continue
            for block in blocks:
                if self._columns[name].digest(self._path(name), block.first, block.rows) != block.sha256:
                    raise damaged_block(self._path(name), block)
            memory.remember(self._path(name), blocks_digest(blocks))
        memory.save()

    def _sets_of(self, records: Sequence[ImageRecord]) -> QuerySets:
        counts = np.array([record.sets for record in records], np.int64)
        starts = self._starts[np.array([record.row for record in records], np.int64)]
        return QuerySets(self._map("query_embeds")[set_rows(starts, counts)], counts, self._boxes_of_sets(records))

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        """int64 [rows]: where the query sets of every image begin, dead ones too."""
        return starts_of(self._sets)

    def _boxes_of_sets(self, records: Sequence[ImageRecord]) -> npt.NDArray[np.int64] | None:
        """The box of each query set of some images; None where no set has one of its own."""
        if not self._made.splits_boxes:
            return None
        return sets_of_images([boxes_from_json(record.boxes) for record in records], self._made)[1]

    @cached_property
    def _made(self) -> Perturbation:
        """The settings that the images were encoded with."""
        return Perturbation.from_dict(self.spec.perturbation)

    def _stored(self, records: Sequence[ImageRecord], query_sets: QuerySets) -> ImageFeatures:
        """Records of any shards, gathered; masks are padded to the largest number of boxes among them."""
        places: dict[int, list[int]] = defaultdict(list)
        for place, record in enumerate(records):
            places[record.shard or 0].append(place)
        image_embeds = np.empty((len(records), self.spec.tokens, self.spec.channels), self.spec.feature_dtype)
        boxes: dict[int, tuple[Floats, Floats]] = {}
        for shard, members in places.items():
            with self._compaction_noticed():
                arrays = self._shards.records(shard, [records[place].slot or 0 for place in members])
            image_embeds[members] = arrays["image_embeds"]
            if "box_weights" in arrays:
                boxes |= {
                    place: (arrays["object_masks"][index], arrays["box_weights"][index])
                    for index, place in enumerate(members)
                }
        if not self.spec.has_masks:
            return ImageFeatures(query_sets, image_embeds)
        most = max((len(weights) for _, weights in boxes.values()), default=0)
        masks = np.zeros((len(records), most, self.spec.tokens), np.float32)
        weights = np.zeros((len(records), most), np.float32)
        for place, (mask, weight) in boxes.items():
            masks[place, : len(mask)], weights[place, : len(weight)] = mask, weight
        return ImageFeatures(query_sets, image_embeds, masks, weights)

    def _encoded_again(self, records: Sequence[ImageRecord]) -> ImageFeatures:
        for record in records:
            check_unchanged(record)
        return self.encoder.encode_images(
            [record.path for record in records], [boxes_from_json(record.boxes) for record in records]
        )
