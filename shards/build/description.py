"""Writes the files that describe a data set, from the manifest rows of its finished shards."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from d2s.common.files import atomic_file, file_sha256, write_json
from d2s.shards.build.layout import Shard
from d2s.shards.build.shard_writer import part_path
from d2s.shards.format import manifest
from d2s.shards.format.file_names import (
    CHECKSUMS,
    DESCRIPTION,
    MANIFEST,
    QUARANTINE,
    SCRATCH,
    SETTINGS,
    SIDECAR,
    SIZES,
)
from d2s.shards.format.index_file import IndexWriter


def write_description(
    out: Path, shards: list[Shard], markers: dict[str, dict], faults: list[dict], settings: dict
) -> None:
    """Writes all files that describe the shards. Writes checksums.json last, because it marks a complete data set.

    Args:
        shards: the shards that have at least one sample, in their final order.
        markers: maps each shard's name to a dictionary with "samples" (their number), "bytes" and "sha256".
        faults: the rows of quarantine.jsonl.
        settings: the content of build.json.
    """
    samples = sum(marker["samples"] for marker in markers.values())
    _write_manifest_and_index(out, shards, samples, settings["in_place"])
    if settings["in_place"]:
        with atomic_file(out / SIDECAR) as file:
            for shard in shards:
                with open(part_path(out, shard).with_suffix(".jsonl"), "rb") as part:
                    shutil.copyfileobj(part, file, 1 << 20)
    write_json(out / SIZES, {shard.name: markers[shard.name]["samples"] for shard in shards})
    write_json(out / SETTINGS, settings)
    write_quarantine(out, faults)
    files = {shard.name: {key: markers[shard.name][key] for key in ("bytes", "sha256")} for shard in shards}
    for name in DESCRIPTION:
        if (out / name).exists():
            files[name] = {"bytes": os.path.getsize(out / name), "sha256": file_sha256(out / name)}
    write_json(out / CHECKSUMS, {"version": 1, "files": files})


def write_quarantine(out: Path, faults: list[dict]) -> None:
    """Writes `faults` to quarantine.jsonl. If there are none, removes the file of an earlier build."""
    if not faults:
        (out / QUARANTINE).unlink(missing_ok=True)
        return
    with atomic_file(out / QUARANTINE) as file:
        for row in faults:
            file.write(json.dumps(row, sort_keys=True).encode() + b"\n")


def _write_manifest_and_index(out: Path, shards: list[Shard], rows: int, in_place: bool) -> None:
    """Writes manifest.parquet and index.arrow. rows: number of samples. Only one shard is in memory at a time."""
    index = IndexWriter(rows, out / SCRATCH)
    sidecar_bytes = 0
    with atomic_file(out / MANIFEST) as file, manifest.open_writer(file) as writer:
        for shard in shards:
            table = pq.read_table(part_path(out, shard))
            crc32 = table.column("crc32").to_numpy()
            table = table.drop_columns(["crc32"])
            if in_place:
                # One file gets the captions of all shards. So the captions of earlier shards shift the offsets.
                column = table.schema.get_field_index("json_offset")
                moved = pa.array(table.column("json_offset").to_numpy() + sidecar_bytes)
                table = table.set_column(column, "json_offset", moved)
                sidecar_bytes += part_path(out, shard).with_suffix(".jsonl").stat().st_size
            writer.write_table(table, row_group_size=table.num_rows)
            index.add(table, crc32)
    index.finish(out, "sidecar" if in_place else "tar")
