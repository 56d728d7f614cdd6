"""Measures an index of 100 million invented rows (`python -m d2s.shards.bench`).

Prints the seconds to open it in a fresh process, the time to look up the samples of thousands of batches in the
random order of an epoch, and the resident memory. The file (64 bytes a row) lies in a temporary folder meanwhile.
"""

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from d2s.shards.format import index_file, manifest
from d2s.shards.format.file_names import INDEX
from d2s.shards.order.permutation import BlockPermutation, Permutation, batch_positions
from d2s.shards.read.index import ShardIndex

_SHARD_ROWS = 10_000
_IMAGE, _JSON = 40_000, 1_000


def write_invented_index(folder: Path, rows: int) -> None:
    """Writes an index of `rows` rows in shards of 10,000, with 5 sparse and 1 dense caption each."""
    (folder / "train").mkdir()
    sample = _IMAGE + _JSON + 1024
    sparse, dense = (pa.array([[""] * count] * _SHARD_ROWS) for count in (5, 1))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        writer = index_file.IndexWriter(rows, Path(scratch))
        for start in range(0, rows, _SHARD_ROWS):
            row = np.arange(min(_SHARD_ROWS, rows - start))
            shard = f"train/{start // _SHARD_ROWS:05}.tar"
            columns = {
                "split": pa.repeat("train", len(row)),
                "shard": pa.repeat(shard, len(row)),
                "image_id": start + row,
                "image_offset": row * sample,
                "image_size": pa.repeat(_IMAGE, len(row)),
                "json_offset": row * sample + _IMAGE + 512,
                "json_size": pa.repeat(_JSON, len(row)),
                "sparse": sparse[: len(row)],
                "dense": dense[: len(row)],
            }
            writer.add(pa.table(columns), row)
            # Opening checks that shards have their full length; truncate gives it without using the disk.
            with open(folder / shard, "wb") as file:
                file.truncate(_SHARD_ROWS * sample)
        writer.finish(folder)
    # Opening checks that there is a manifest; an empty one is enough, since no key is looked up.
    manifest.write_manifest(folder, manifest.schema().empty_table())


def look_up(folder: Path, batches: int, batch_size: int) -> dict[str, float]:
    """Opens the index and looks up all samples of some batches; returns seconds, ms a batch, and MB of memory."""
    base = psutil.Process().memory_info().rss
    start = time.perf_counter()
    index = ShardIndex.open(folder)
    pairs = index.n_sparse_total("train")
    result = {"open_s": time.perf_counter() - start}
    blocks = BlockPermutation(index.shard_sizes("train", "sparse"), 0, 0, 8)
    for name, order in (("rows", Permutation(pairs, 0, 0)), ("blocks", blocks)):
        start = time.perf_counter()
        for step in range(batches):
            positions = batch_positions(step, batch_size)
            rows, _ = index.pair("train", order(np.arange(positions.start, positions.stop)))
            for row in rows.tolist():
                index.location(row)
        result[f"{name}_ms"] = (time.perf_counter() - start) / batches * 1e3
    resident = psutil.Process().memory_info().rss
    return result | {"base_mb": base / 2**20, "resident_mb": resident / 2**20}


def main(argv: list[str] | None = None) -> int:
    """Prints the measurements and returns 0."""
    parser = argparse.ArgumentParser(prog="python -m d2s.shards.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000_000, help="rows of the index (64 bytes each)")
    parser.add_argument("--batches", type=int, default=3000, help="batches to look up in either order")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--dir", type=Path, help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--quick", action="store_true", help="1 million rows, 200 batches")
    args = parser.parse_args(argv)
    if args.quick:
        args.rows, args.batches = 1_000_000, 200
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        start = time.perf_counter()
        write_invented_index(Path(name), args.rows)
        size = (Path(name) / INDEX).stat().st_size
        wrote = time.perf_counter() - start
        print(f"index of {args.rows:,} rows, {size / 2**30:.2f} GB, written in {wrote:.1f} s", flush=True)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            found = fresh.submit(look_up, Path(name), args.batches, args.batch_size).result()
    print(f"opened in a fresh process in {found['open_s']:.3f} s (goal 5)")
    for order in ("rows", "blocks"):
        print(f"{args.batch_size} samples found in order by {order}: {found[order + '_ms']:.2f} ms a batch")
    print(f"resident {found['resident_mb']:.0f} MB, of it {found['base_mb']:.0f} before opening (goal 1024)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
