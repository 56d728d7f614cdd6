"""Measures an index of 100 million invented rows, or builds (`python -m d2s.shards.bench [--sources N]`).

Prints the time to open the index in a new process, the time to look up the samples of a batch in the random
order of an epoch, and the resident memory. The index (64 bytes for each row) goes to a temporary folder.

With `--sources N` it builds N generated photos three times instead: from JSON lines with image files, from
CSV with image files, and from parquet that contains the images. It prints photos per second and peak memory.
"""

import argparse
import csv
import io
import json
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from d2s.common.command import user_path
from d2s.shards.build.assignment import assign
from d2s.shards.build.data_set import build
from d2s.shards.build.layout import Layout
from d2s.shards.build.settings import BuildConfig
from d2s.shards.format import index_file, manifest
from d2s.shards.format.file_names import INDEX
from d2s.shards.order.permutation import BlockPermutation, Permutation, batch_positions
from d2s.shards.read.index import ShardIndex
from d2s.shards.sources import table
from d2s.shards.sources.entry import SourceOptions
from d2s.shards.sources.faults import Faults

_SHARD_ROWS = 10_000
_CHUNK = 1 << 20
_CAPTIONS = 5
_GROUP = 100
_IMAGE, _JSON = 40_000, 1_000


def write_invented_index(folder: Path, rows: int) -> None:
    """Writes an index of `rows` rows in shards of 10,000 rows. Each row has 5 sparse captions and 1 dense."""
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
            # Opening an index checks the size of each shard; truncate sets it without using disk space.
            with open(folder / shard, "wb") as file:
                file.truncate(_SHARD_ROWS * sample)
        writer.finish(folder)
    # Opening an index requires a manifest. It may be empty, since no key is looked up.
    manifest.write_manifest(folder, manifest.schema().empty_table())


def look_up(folder: Path, batches: int, batch_size: int) -> dict[str, float]:
    """Opens the index and looks up `batches` batches of samples in two orders. Returns times and memory."""
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


def write_sources(folder: Path, photos: int, pixels: int) -> dict[str, list[str]]:
    """Writes photos with five captions each in three formats. Maps each format to its build options."""
    (folder / "photos").mkdir()
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("caption", pa.string())]
    )
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    with (
        open(folder / "rows.jsonl", "w") as lines,
        open(folder / "rows.csv", "w", newline="") as csv_file,
        pq.ParquetWriter(folder / "rows.parquet", schema) as parquet,
    ):
        writer = csv.writer(csv_file)
        writer.writerow(("image", "caption"))
        for start in range(0, photos, _GROUP):
            rows = []
            for number in range(start, min(start + _GROUP, photos)):
                file, name = io.BytesIO(), f"{number:07}.jpg"
                Image.fromarray(np.roll(noise, number) ^ (number & 255)).resize((pixels, pixels)).save(
                    file, "JPEG"
                )
                (folder / "photos" / name).write_bytes(file.getvalue())
                for caption in (f"caption {each} of photo {number}, made up" for each in range(_CAPTIONS)):
                    lines.write(json.dumps({"image": name, "caption": caption}) + "\n")
                    writer.writerow((name, caption))
                    rows.append({"image": {"bytes": file.getvalue(), "path": name}, "caption": caption})
            # In parquet, each photo has only one row, as is usual on the Hugging Face hub.
            parquet.write_table(pa.Table.from_pylist(rows[::_CAPTIONS], schema=schema))
    photos = ["--images", str(folder / "photos")]
    forms = {"jsonl": photos, "csv": photos, "parquet": []}
    return {form: ["--captions", str(folder / f"rows.{form}"), *more] for form, more in forms.items()}


def build_source(form: str, arguments: list[str], folder: Path, only_list: bool) -> dict[str, float]:
    """Builds from one format. With `only_list`, only assigns images to shards. Returns time and memory."""
    columns = {"path": "image", "sparse": "caption"}
    paths = dict(zip(arguments[::2], map(Path, arguments[1::2]), strict=True))
    options = SourceOptions(
        captions=[(None, paths["--captions"])],
        images=paths.get("--images"),
        columns=columns,
        scratch=folder / f"scratch-{form}",
    )
    entries, out = table.entries(options, Faults()), folder / f"out-{form}"
    start, cpu = time.perf_counter(), time.process_time()
    if only_list:
        out.mkdir()
        assign(out, entries, join=None, layout=Layout(), faults=Faults())
    else:
        build(entries, out, BuildConfig())
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "s": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu,
        "peak_mb": used.ru_maxrss / 1024,
    }


def measure_sources(folder: Path, photos: int, pixels: int, only_list: bool) -> None:
    """Prints the rate and peak memory of building from each format."""
    forms = write_sources(folder, photos, pixels)
    print(
        f"{photos:,} photos of {pixels} x {pixels} pixels; {_CAPTIONS} rows each in jsonl and csv", flush=True
    )
    for form, arguments in forms.items():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            found = fresh.submit(build_source, form, arguments, folder, only_list).result()
        rate = f"{photos / found['s']:,.0f} photos a second"
        cpu = f"{found['cpu_s'] / photos * 1e3:.2f} ms of CPU each"
        print(f"{form}: {rate}, {cpu}, peak of memory {found['peak_mb']:,.0f} MB (goal 1024)", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark, prints its measurements, and returns 0."""
    parser = argparse.ArgumentParser(prog="python -m d2s.shards.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000_000, help="rows of the index (64 bytes each)")
    parser.add_argument("--batches", type=int, default=3000, help="batches to look up in either order")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--dir", type=user_path, help="where the temporary folder is made (default: the system's)"
    )
    parser.add_argument("--quick", action="store_true", help="1 million rows, 200 batches")
    parser.add_argument(
        "--sources", type=int, metavar="N", help="build N made-up photos instead, from three forms"
    )
    parser.add_argument("--pixels", type=int, default=256, help="of the photos, a side")
    parser.add_argument("--list-only", action="store_true", help="list the photos, but write no shards")
    args = parser.parse_args(argv)
    if args.sources:
        with tempfile.TemporaryDirectory(dir=args.dir) as name:
            measure_sources(Path(name), args.sources, args.pixels, args.list_only)
        return 0
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
