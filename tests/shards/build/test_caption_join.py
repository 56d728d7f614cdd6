"""The join of captions kept apart equals that of a dictionary, for any order and any gaps."""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_sources import Karpathy

from d2s.shards.build.caption_join import JoinOptions, join_captions
from d2s.shards.format.keys import hash64
from d2s.shards.format.manifest import read_manifest
from d2s.shards.format.row_file import RowFile
from d2s.shards.sources.faults import Faults

NAMES = [f"image {number}" for number in range(12)]


@settings(max_examples=60, deadline=None)
@given(
    images=st.lists(st.sampled_from(NAMES), unique=True, min_size=1),
    rows=st.lists(st.sampled_from(NAMES), max_size=15),
)
def test_join_equals_that_of_a_dictionary(images: list[str], rows: list[str]) -> None:
    expected: dict[str, str] = {}
    doubles = 0
    for number, name in enumerate(rows):
        if name in images and name in expected:
            doubles += 1
        expected.setdefault(name, f"text {number}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.jsonl"
        lines = [json.dumps({"filename": name, "text": f"text {number}"}) for number, name in enumerate(rows)]
        path.write_text("\n".join(lines))
        alive, faults = np.ones(len(images), bool), Faults(quarantine=True)
        hashes = np.array([hash64(name) for name in images], np.uint64)
        spool = Path(folder) / "spool"
        matched, extra = join_captions(
            JoinOptions(path=path), hashes, alive, spool, faults, lambda image: images[image]
        )
        found = RowFile(spool)
        for name, row, alone in zip(images, matched.tolist(), alive.tolist(), strict=True):
            assert alone == (row >= 0) == (name in expected)
            if row >= 0:
                assert found.row(row) == {"key": name, "sparse": [], "dense": [expected[name]]}
    strangers = [name for name in rows if name not in images]
    missing = [name for name in images if name not in expected]
    assert extra == len(strangers)
    assert len(faults.rows) == doubles + len(strangers) + len(missing)


@pytest.mark.parametrize("key", ["image_id", "key", "sha256"])
def test_any_file_joins_by_any_key(key: str, karpathy: Karpathy, tmp_path: Path) -> None:
    for row, source in zip(karpathy.long, karpathy.rows, strict=True):
        name = row.pop("filename")
        values = {
            "image_id": source["imgid"],
            "key": name.removesuffix(".jpg").replace(".", "_"),
            "sha256": hashlib.sha256((karpathy.images / name).read_bytes()).hexdigest().upper(),
        }
        row["which"], row["more"] = values[key], [f"First of {name}.", f"Second of {name}."]
    karpathy.long.reverse()
    options = ["--dense-key", key, "--dense-key-column", "which", "--dense-columns", "text,more"]
    assert karpathy.build(tmp_path / "out", *options) == 0
    for row in read_manifest(tmp_path / "out").to_pylist():
        name = row["source_id"]
        assert row["dense"] == [f"All about {name}.", f"First of {name}.", f"Second of {name}."]


def test_long_file_is_joined_across_batches(karpathy: Karpathy, tmp_path: Path) -> None:
    strangers = [{"filename": f"stranger {number}", "text": "x"} for number in range(20_000)]
    karpathy.long = [*karpathy.long[:7], *strangers, *karpathy.long[7:]]
    assert karpathy.build(tmp_path / "out", "--dense-extra", "allow") == 0
    for row in read_manifest(tmp_path / "out").to_pylist():
        assert row["dense"] == [f"All about {row['source_id']}."]
