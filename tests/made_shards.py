"""Small data sets for tests, written straight into shards: no source, no build."""

import io
import json
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from d2s.shards.format.index_file import IndexWriter
from d2s.shards.format.manifest import schema, split_by_shard, write_manifest

WORDS = [
    "a",
    "red",
    "blue",
    "green",
    "dog",
    "cat",
    "ball",
    "man",
    "woman",
    "child",
    "runs",
    "sits",
    "jumps",
    "on",
    "under",
    "near",
    "the",
    "grass",
    "sand",
    "water",
]


def write_index(folder: Path, table: pa.Table, crc32: np.ndarray, json_home: str = "tar") -> None:
    """Writes index.arrow for a manifest table, whose rows must be in the order of the manifest."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        writer, start = IndexWriter(table.num_rows, Path(scratch)), 0
        for part in split_by_shard(table):
            writer.add(part, crc32[start : start + part.num_rows])
            start += part.num_rows
        writer.finish(Path(folder), json_home)


def picture(number: int, width: int = 40, height: int = 30, format: str = "JPEG") -> bytes:
    """A picture of two colours that no other number has."""
    rng = np.random.default_rng(number)
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = rng.integers(0, 256, 3)
    pixels[:, : width // 2] = rng.integers(0, 256, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, quality=90)
    return file.getvalue()


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def captions(number: int, sparse: int = 2, dense: int = 1) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(number)
    short = [f"{sentence(rng, 5)} number {number} view {j}" for j in range(sparse)]
    long = [". ".join(sentence(rng, 6) for _ in range(4)) + f". Number {number} {j}." for j in range(dense)]
    return short, long


def make_shards(
    folder: Path,
    counts: dict[str, int] | None = None,
    *,
    per_shard: int = 4,
    n_sparse: list[int] | None = None,
    n_dense: list[int] | None = None,
    images_per_id: int = 1,
) -> Path:
    """Writes tars, manifest and index; caption counts cycle through n_sparse and n_dense."""
    n_sparse, n_dense = n_sparse or [2], n_dense or [1]
    rows, checksums, number = [], [], 0
    for split, count in (counts or {"train": 12, "val": 5}).items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for first in range(0, count, per_shard):
            shard = f"{split}/{first // per_shard:05}.tar"
            with tarfile.open(folder / shard, "w", format=tarfile.USTAR_FORMAT) as tar:
                for _ in range(min(per_shard, count - first)):
                    short, long = captions(
                        number, n_sparse[number % len(n_sparse)], n_dense[number % len(n_dense)]
                    )
                    row = {"key": f"k{number:04}", "image_id": 1000 + number // images_per_id, "split": split}
                    row |= {"sparse": short, "dense": long, "width": 40, "height": 30, "sha256": ""}
                    image, text = picture(number), json.dumps(row, sort_keys=True).encode()
                    row |= {"source_id": f"{number}.jpg", "shard": shard}
                    for name, data in (("image", image), ("json", text)):
                        info = tarfile.TarInfo(f"{row['key']}.{'jpg' if name == 'image' else 'json'}")
                        info.size = len(data)
                        row[f"{name}_offset"], row[f"{name}_size"] = tar.offset + 512, len(data)
                        tar.addfile(info, io.BytesIO(data))
                    rows.append(row)
                    checksums.append(zlib.crc32(text, zlib.crc32(image)))
                    number += 1
    table = pa.Table.from_pylist(rows, schema=schema())
    write_manifest(folder, table)
    write_index(folder, table, np.array(checksums, np.uint32))
    return folder
