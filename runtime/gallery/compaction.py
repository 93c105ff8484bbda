"""Giving back the space of deleted images: new column files and shards with the live ones, then one commit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.gallery.catalogue import (
    Block,
    Catalogue,
    ImageRecord,
    Shard,
    insert_blocks,
    insert_images,
    insert_shards,
    insert_texts,
    text_column,
    vector_columns,
)
from qpert.runtime.gallery.columns import Column
from qpert.runtime.gallery.fields import insert_fields, read_fields
from qpert.runtime.gallery.shards import ShardReader, write_shard
from qpert.runtime.retrieval.query_sets import set_rows, starts_of

ROWS_AT_ONCE = 1024


def compact(catalogue: Catalogue) -> int:
    """Returns the number of dead images. A crash before the commit leaves the gallery as it was; the files that are no
    longer spoken of afterwards are the caller's to delete."""
    live, texts, fields = catalogue.images(), catalogue.texts(), read_fields(catalogue)
    dead = catalogue.count("image") - len(live)
    if not dead:
        return 0
    generation = catalogue.generation + 1
    rows = [record.row for record in live]
    counts = catalogue.sets()
    sets = set_rows(starts_of(counts)[rows], counts[rows]).tolist()
    blocks = [block for column in vector_columns(catalogue.spec) for block in _copy(catalogue, column, sets)]
    blocks += _copy(catalogue, text_column(catalogue.spec), [row for row, _, _ in texts])
    moved, shards = _copy_shards(catalogue, live, generation)
    new_row = {row: place for place, row in enumerate(rows)}
    with catalogue.transaction() as connection:
        for table in ("image", "text", "field", "shard", "block"):
            connection.execute(f"DELETE FROM {table}")
        insert_images(connection, [replace(record, row=place) for place, record in enumerate(moved)])
        insert_texts(connection, [(place, new_row[image], text) for place, (_, image, text) in enumerate(texts)])
        insert_fields(connection, [(place, fields[row]) for row, place in new_row.items() if row in fields])
        insert_shards(connection, shards)
        insert_blocks(connection, blocks)
        connection.execute("UPDATE meta SET generation = ?", (generation,))
    return dead


def _copy(catalogue: Catalogue, column: Column, rows: Sequence[int]) -> list[Block]:
    """The column's live rows in a file of the next generation."""
    old_path = column.file(catalogue.folder, catalogue.generation)
    new_path = column.file(catalogue.folder, catalogue.generation + 1)
    new_path.unlink(missing_ok=True)  # of a compaction that did not end
    old = column.map(old_path, max((b.first + b.rows for b in catalogue.blocks(column.name)), default=0))
    blocks = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part: npt.NDArray[Any] = old[np.asarray(rows[start : start + ROWS_AT_ONCE])]
        blocks.append(Block(column.name, start, len(part), column.append(new_path, start, part)))
    return blocks


def _copy_shards(
    catalogue: Catalogue, live: Sequence[ImageRecord], generation: int
) -> tuple[list[ImageRecord], list[Shard]]:
    """Live records with where their features lie afterwards: shards without a dead one stay as they are."""
    members: dict[int | None, list[ImageRecord]] = defaultdict(list)
    for record in live:
        members[record.shard].append(record)
    kept: list[Shard] = []
    moved = {record.row: record for record in live}
    reader = ShardReader(catalogue.folder, catalogue.shards())
    for shard in catalogue.shards():
        staying = members[shard.id]
        if len(staying) == shard.records:
            kept.append(shard)
        elif staying:
            arrays = reader.records(shard.id, [record.slot or 0 for record in staying])
            kept.append(write_shard(catalogue.folder, shard.id, generation, arrays))
            moved |= {record.row: replace(record, slot=slot) for slot, record in enumerate(staying)}
    reader.close()
    return [moved[record.row] for record in live], kept
