"""Tars that others wrote are described where they lie, and none of their bytes changes."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import webdataset
from shard_sources import contents, picture

from d2s.shards.cli import main
from d2s.shards.format.manifest import read_manifest
from d2s.shards.read.index import ShardIndex
from d2s.shards.read.records import ShardReader


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two splits of tars by webdataset; keys repeat from tar to tar, and times and owners are what they are."""
    for name in ("train/00000", "train/00001", "val/00000"):
        path = tmp_path / "tars" / f"{name}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        with webdataset.TarWriter(str(path)) as writer:
            for number in range(3):
                sample = {
                    "__key__": f"{number:04d}",
                    "jpg": picture(number),
                    "txt": f"{number} of {name}",
                    "cls": 7,
                }
                writer.write(sample)
    return tmp_path / "tars"


def _index(folder: Path) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(folder / "index.arrow"))).get_batch(0)


def test_tars_are_indexed_without_a_changed_byte(tars: Path) -> None:
    before = contents(tars)
    assert main(["index", str(tars), "--workers", "2"]) == 0
    after = contents(tars)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {
        "manifest.parquet",
        "index.arrow",
        "captions.jsonl",
        "sizes.json",
        "build.json",
        "checksums.json",
    }
    rows = read_manifest(tars).to_pylist()
    assert [row["source_id"] for row in rows[:4]] == [
        f"train/0000{n}/000{k}.jpg" for n, k in ("00", "01", "02", "10")
    ]
    assert len({row["key"] for row in rows}) == 9
    meta = json.loads(_index(tars).schema.metadata[b"d2s"])
    assert meta["json"] == "sidecar"
    assert meta["splits"] == {"train": [0, 6], "val": [6, 9]}
    for row in rows:
        image = before[row["shard"]][row["image_offset"] :][: row["image_size"]]
        assert image == picture(int(row["source_id"].split("/")[-1][:4]))
        text = after["captions.jsonl"][row["json_offset"] :][: row["json_size"]]
        assert (
            json.loads(text)["sparse"]
            == row["sparse"]
            == [f"{int(row['source_id'][-8:-4])} of {row['shard'][:-4]}"]
        )
    assert main(["verify", str(tars)]) == 0


def test_any_number_of_workers_gives_the_same_files_and_force_makes_them_anew(
    tars: Path, refused: Callable[..., str]
) -> None:
    assert main(["index", str(tars)]) == 0
    first = contents(tars)
    assert "indexed already; --force" in refused(["index", str(tars)])
    assert main(["index", str(tars), "--workers", "3", "--force"]) == 0
    assert contents(tars) == first


def test_damage_in_indexed_tars_is_found(tars: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["index", str(tars)]) == 0
    row = read_manifest(tars).to_pylist()[4]
    data = bytearray((tars / row["shard"]).read_bytes())
    data[row["image_offset"] + 50] ^= 8
    (tars / row["shard"]).write_bytes(data)
    assert main(["verify", str(tars)]) == 1
    assert f"{row['shard']}: {row['key']}: the image's sha256" in capsys.readouterr().out
    data[row["image_offset"] + 50] ^= 8
    data[row["image_offset"] - 300] ^= 8
    (tars / row["shard"]).write_bytes(data)
    assert main(["verify", str(tars)]) == 1
    assert f"{row['shard']}: its sha256" in capsys.readouterr().out


def test_broken_image_is_named_or_left_out(tars: Path, refused: Callable[..., str]) -> None:
    with webdataset.TarWriter(str(tars / "train/00002.tar")) as writer:
        writer.write({"__key__": "bad", "jpg": picture(1)[:-100], "txt": "cut short"})
        writer.write({"__key__": "good", "jpg": picture(1), "txt": "whole"})
    assert "train/00002.tar: bad: image" in refused(["index", str(tars)])
    assert not (tars / "checksums.json").exists()
    assert main(["index", str(tars), "--on-error", "quarantine"]) == 0
    assert read_manifest(tars, split="train").num_rows == 7
    listed = json.loads((tars / "quarantine.jsonl").read_text())
    assert "does not decode" in listed["reason"]


def test_our_own_tars_can_be_described_anew(dataset: Path, tmp_path: Path) -> None:
    for path in dataset.glob("*/*.tar"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.relative_to(dataset)).write_bytes(path.read_bytes())
    assert main(["index", str(tmp_path)]) == 0
    columns = ["key", "split", "shard", "image_offset", "sha256", "sparse", "dense"]
    assert read_manifest(tmp_path, columns).equals(read_manifest(dataset, columns))


def test_read_only_tars_are_described_in_a_folder_of_its_own(
    tars: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, out = contents(tars), tmp_path / "index"
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)
        assert "cannot be written to; --out" in refused(["index", str(tars)])
        assert main(["index", str(tars), "--out", str(out)]) == 0
    assert contents(tars) == before
    assert main(["verify", str(out)]) == 0
    assert ShardReader(ShardIndex.open(out)).record(0).image == picture(0)
    described = contents(out)
    assert main(["index", str(tars), "--out", str(out), "--force"]) == 0
    assert contents(out) == described
    assert main(["index", str(tars)]) == 0
    assert {name: described[name] for name in described} == contents(tars)
    assert "lies in" in refused(["index", str(tars), "--out", str(tars / "index")])
    (out / "train/00009.tar").write_bytes(b"")
    assert "no link to a tar of" in refused(["index", str(tars), "--out", str(out), "--force"])
