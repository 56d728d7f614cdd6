"""Damage is found wherever it is, and told with shard and key."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_shards import write_index

from d2s.shards.cli import main
from d2s.shards.format.manifest import read_manifest, write_manifest
from d2s.shards.inspect.verify import verify


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    """A data set to be spoilt."""
    return shutil.copytree(dataset, tmp_path / "copy")


def _flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def _faults(folder: Path) -> list[str]:
    return [str(fault) for fault in verify(folder)]


def test_whole_data_set_has_no_fault(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["verify", str(dataset), "--workers", "2"]) == 0
    assert capsys.readouterr().out == f"{dataset}: no fault\n"


def test_flipped_byte_in_an_image_or_its_captions_names_shard_and_key(
    copy: Path, capsys: pytest.CaptureFixture
) -> None:
    row = read_manifest(copy).to_pylist()[6]
    for kind, told in (("image", "the image's sha256"), ("json", "the captions")):
        place = row[f"{kind}_offset"] + row[f"{kind}_size"] // 2
        _flip(copy / row["shard"], place)
        assert main(["verify", str(copy)]) == 1
        assert f"{row['shard']}: {row['key']}: {told}" in capsys.readouterr().out
        _flip(copy / row["shard"], place)


def test_flipped_byte_in_a_tar_header_names_the_key_behind_it(copy: Path) -> None:
    row = read_manifest(copy).to_pylist()[6]
    for kind in ("image", "json"):
        for place in (0, 99, 120, 136, 150, 156, 260, 511):
            _flip(copy / row["shard"], row[f"{kind}_offset"] - 512 + place)
            found = _faults(copy)
            assert len(found) == 1
            assert found[0].startswith(f"{row['shard']}: {row['key']}: the tar header of {row['key']}.")
            _flip(copy / row["shard"], row[f"{kind}_offset"] - 512 + place)


def test_no_flipped_byte_anywhere_escapes(copy: Path) -> None:
    rng = np.random.default_rng(0)
    for path in sorted(p for p in copy.rglob("*") if p.is_file()):
        name = path.relative_to(copy).as_posix()
        size = path.stat().st_size
        for place in {0, size // 2, size - 1, *rng.integers(0, size, 8).tolist()}:
            bit = int(rng.integers(0, 8))
            _flip(path, place, bit)
            found = _faults(copy)
            assert found, f"byte {place} of {name}"
            assert name == "checksums.json" or any(line.startswith(f"{name}: ") for line in found), found
            _flip(path, place, bit)
    assert _faults(copy) == []


def test_missing_and_foreign_files_are_named(copy: Path) -> None:
    (copy / "train/00001.tar").rename(copy / "train/00009.tar")
    (copy / "sizes.json").unlink()
    found = _faults(copy)
    assert "train/00001.tar: missing" in found
    assert any(line.startswith("train/00009.tar: is no part of the data set") for line in found)
    assert "sizes.json: missing" in found


def test_tar_cut_short_names_the_samples_it_lost(copy: Path) -> None:
    row = read_manifest(copy).to_pylist()[3]
    data = (copy / row["shard"]).read_bytes()
    (copy / row["shard"]).write_bytes(data[: row["image_offset"] + 10])
    found = _faults(copy)
    assert f"{row['shard']}: {row['key']}: the image lies beyond the end of the tar" in found
    assert any("where the build wrote" in line for line in found)


@pytest.mark.parametrize("name", ["train/00001.tar", "sizes.json"])
def test_damaged_checksums_are_found_where_every_file_is_whole(name: str, copy: Path) -> None:
    checksums = json.loads((copy / "checksums.json").read_text())
    checksums["files"][name]["bytes"] += 1
    (copy / "checksums.json").write_text(json.dumps(checksums))
    assert _faults(copy) == [f"checksums.json: damaged: its size of {name} is not the file's"]
    checksums["files"][name]["bytes"] -= 1
    (copy / "checksums.json").write_text(json.dumps(checksums | {"version": 9}))
    assert _faults(copy) == ["checksums.json: damaged: its version is 9, not 1"]


def test_unfinished_build_is_a_fault(copy: Path) -> None:
    (copy / "checksums.json").unlink()
    assert _faults(copy) == ["checksums.json: missing: the build did not finish"]


def _bless(folder: Path) -> None:
    """Makes the checksums those of the files as they are now, as an editing hand might."""
    from d2s.common.files import file_sha256

    checksums = json.loads((folder / "checksums.json").read_text())
    for name in checksums["files"]:
        facts = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        checksums["files"][name] = facts
    (folder / "checksums.json").write_text(json.dumps(checksums))


def _crc32(folder: Path) -> np.ndarray:
    batch = pa.ipc.open_file(pa.OSFile(str(folder / "index.arrow"))).get_batch(0)
    return batch.column("crc32").to_numpy().copy()


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda rows: rows[0].update(image_id=rows[5]["image_id"]), "stands there more than once"),
        (
            lambda rows: rows[0].update(sparse=["another caption"]),
            "the captions (JSON) are not the manifest's",
        ),
        (lambda rows: rows[0].update(image_offset=rows[0]["image_offset"] + 1), "the image's sha256"),
    ],
)
def test_manifest_that_does_not_fit_is_found_without_checksums(
    change: Callable[[list[dict]], None], expected: str, copy: Path
) -> None:
    table, checksums = read_manifest(copy), _crc32(copy)
    rows = table.to_pylist()
    change(rows)
    write_manifest(copy, pa.Table.from_pylist(rows, schema=table.schema))
    write_index(copy, read_manifest(copy), checksums)
    _bless(copy)
    assert any(expected in line for line in _faults(copy))


def test_index_that_does_not_fit_the_manifest_is_found_without_checksums(copy: Path) -> None:
    table, checksums = read_manifest(copy), _crc32(copy)
    checksums[2] += 1
    write_index(copy, table, checksums)
    _bless(copy)
    key = table.column("key")[2].as_py()
    assert _faults(copy) == [f"train/00000.tar: {key}: the crc32 in index.arrow is another"]
    checksums[2] -= 1
    write_index(copy, table.slice(0, 10), checksums[:10])
    _bless(copy)
    assert _faults(copy) == ["index.arrow: 10 rows, but the manifest has 15"]
    rows = table.to_pylist()
    rows[1]["image_id"] = 7
    write_index(copy, pa.Table.from_pylist(rows, schema=table.schema), checksums)
    _bless(copy)
    assert _faults(copy) == [f"index.arrow: {rows[1]['key']}: image_id is not the manifest's"]


def test_written_index_equals_the_one_of_the_build(copy: Path) -> None:
    before = (copy / "index.arrow").read_bytes()
    write_index(copy, read_manifest(copy), _crc32(copy))
    assert (copy / "index.arrow").read_bytes() == before
    before = (copy / "manifest.parquet").read_bytes()
    write_manifest(copy, read_manifest(copy))
    assert (copy / "manifest.parquet").read_bytes() == before
