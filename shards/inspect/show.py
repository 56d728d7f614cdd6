"""Shows a sample. Prints its properties and captions, and saves its image to a file."""

import difflib
from pathlib import Path

import pyarrow.parquet as pq

from d2s.shards.format import manifest
from d2s.shards.format.file_names import MANIFEST
from d2s.shards.format.image_file import check_image

# `find` suggests a similar key only if there are at most this many samples, because it must read all keys.
_HINT_ROWS = 200_000


def find(folder: Path, key: str) -> dict:
    """Returns the manifest row of `key`. Raises ValueError, which may suggest a similar key, if there is no row."""
    path = folder / MANIFEST
    manifest.open_manifest(folder).close()
    rows = pq.read_table(path, filters=[("key", "==", key)]).to_pylist()
    if rows:
        return rows[0]
    hint = ""
    if pq.ParquetFile(path).metadata.num_rows <= _HINT_ROWS:
        near = difflib.get_close_matches(key, pq.read_table(path, columns=["key"]).column(0).to_pylist(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{folder}: no sample with key {key!r}{hint}")


def save_image(folder: Path, row: dict, out: Path | None) -> Path:
    """Writes the image of a manifest row to a file, and returns the path of the file.

    `out` is a file or an existing folder. None means the working directory. In folders, the file is <key>.<suffix>.
    Raises ValueError if the image in the tar is damaged, or if the file exists with other content.
    """
    with open(folder / row["shard"], "rb") as file:
        file.seek(row["image_offset"])
        data = file.read(row["image_size"])
    try:
        suffix = check_image(data).suffix
    except ValueError as error:
        raise ValueError(f"{row['shard']}: {row['key']}: {error}; run `python -m d2s.shard verify`") from None
    name = f"{row['key']}.{suffix}"
    path = Path(name) if out is None else out / name if out.is_dir() else out
    if path.exists() and path.read_bytes() != data:
        raise ValueError(f"{path}: exists with other content; give another --out")
    path.write_bytes(data)
    return path


def describe(row: dict) -> str:
    """Returns a text with the properties of a manifest row, followed by its captions."""
    lines = [
        f"key        {row['key']}",
        f"source     {row['source_id']} (image id {row['image_id']})",
        f"split      {row['split']}",
        f"stored in  {row['shard']} at byte {row['image_offset']:,}, {row['image_size']:,} bytes",
        f"pixels     {row['width']} x {row['height']}",
        f"sha256     {row['sha256']}",
    ]
    lines += [f"sparse {number}   {caption}" for number, caption in enumerate(row["sparse"])]
    lines += [f"dense {number}    {caption}" for number, caption in enumerate(row["dense"])]
    return "\n".join(lines)
