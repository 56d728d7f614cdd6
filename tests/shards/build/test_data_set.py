"""What a build promises: the same bytes each time, whole shards only, nothing lost and nothing twice."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from shard_sources import Karpathy, contents, picture

from d2s.shards.build import data_set as build_module
from d2s.shards.build.layout import Layout, ShardSize, arrange
from d2s.shards.cli import main
from d2s.shards.format.manifest import read_manifest


def test_any_number_of_workers_and_any_place_give_the_same_bytes(karpathy: Karpathy, tmp_path: Path) -> None:
    assert karpathy.build(tmp_path / "one", "--workers", "1") == 0
    assert karpathy.build(tmp_path / "elsewhere" / "three", "--workers", "3") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "elsewhere" / "three")


def test_another_seed_gives_another_order_of_the_same_samples(karpathy: Karpathy, tmp_path: Path) -> None:
    keys = []
    for seed in ("0", "1"):
        assert karpathy.build(tmp_path / seed, "--seed", seed) == 0
        keys.append(read_manifest(tmp_path / seed, ["key"], "train").column("key").to_pylist())
    assert keys[0] != keys[1]
    assert sorted(keys[0]) == sorted(keys[1])
    assert keys[0] != sorted(keys[0])


def test_every_sample_has_its_own_image_and_captions(karpathy: Karpathy, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert karpathy.build(out) == 0
    rows = {row["source_id"]: row for row in read_manifest(out).to_pylist()}
    assert len(rows) == 15
    for source, dense in zip(karpathy.rows, karpathy.long, strict=True):
        row = rows[source["filename"]]
        assert row["split"] == source["split"] == row["shard"].split("/")[0]
        assert row["image_id"] == source["imgid"]
        assert row["sparse"] == [sentence["raw"] for sentence in source["sentences"]]
        assert row["dense"] == [dense["text"]]
        assert (row["width"], row["height"]) == (40, 32)
        with open(out / row["shard"], "rb") as file:
            file.seek(row["image_offset"])
            assert file.read(row["image_size"]) == (karpathy.images / source["filename"]).read_bytes()
            file.seek(row["json_offset"])
            member = json.loads(file.read(row["json_size"]))
        assert member == {name: row[name] for name in member}


def test_public_webdataset_reads_back_what_was_written(dataset: Path) -> None:
    rows = read_manifest(dataset).to_pylist()
    urls = [str(dataset / shard) for shard in dict.fromkeys(row["shard"] for row in rows)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows]
    assert not any("." in row["key"] or "/" in row["key"] for row in rows)
    for sample, row in zip(samples, rows, strict=True):
        assert {name for name in sample if not name.startswith("__")} == {"jpg", "json"}
        assert zlib.crc32(sample["json"], zlib.crc32(sample["jpg"])) == _crc(dataset, row["key"])
        assert json.loads(sample["json"])["sparse"] == row["sparse"]
    sizes = json.loads((dataset / "sizes.json").read_text())
    assert [sizes[Path(url).relative_to(dataset).as_posix()] for url in urls] == [4, 4, 2, 3, 2]


def _crc(folder: Path, key: str) -> int:
    place = read_manifest(folder, ["key"]).column("key").to_pylist().index(key)
    return _index(folder).column("crc32")[place].as_py()


def _index(folder: Path) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(folder / "index.arrow"))).get_batch(0)


def test_index_repeats_the_manifest(dataset: Path) -> None:
    index, table = _index(dataset), read_manifest(dataset)
    meta = json.loads(index.schema.metadata[b"d2s"])
    assert meta["splits"] == {"train": [0, 10], "val": [10, 13], "test": [13, 15]}
    assert [meta["shards"][n] for n in index.column("shard").to_pylist()] == table.column("shard").to_pylist()
    counts = [len(captions) for captions in table.column("sparse").to_pylist()]
    assert index.column("n_sparse").to_pylist() == counts
    assert index.column("sparse_start").to_pylist() == [sum(counts[:n]) for n in range(len(counts))]
    for name in ("image_offset", "image_size", "json_offset", "json_size", "image_id"):
        assert index.column(name).to_pylist() == table.column(name).to_pylist()


def test_tar_members_say_nothing_of_when_and_by_whom(dataset: Path) -> None:
    with tarfile.open(dataset / "train/00000.tar") as tar:
        members = tar.getmembers()
    assert len(members) == 8
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


class _Stop(KeyboardInterrupt):
    pass


def test_interrupted_build_shows_no_half_and_resumes_to_the_same_bytes(
    karpathy: Karpathy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert karpathy.build(whole) == 0
    real, written = build_module.write_shard, []

    def stop_at_the_third(shard: object) -> None:
        if len(written) == 2:
            raise _Stop
        real(shard)
        written.append(shard.name)

    monkeypatch.setattr(build_module, "write_shard", stop_at_the_third)
    assert karpathy.build(out) == 130
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.tar")) == sorted(written)
    assert not (out / "manifest.parquet").exists()
    monkeypatch.setattr(build_module, "write_shard", real)
    assert main(karpathy.arguments(out)) == 2
    before = {name: (out / name).stat().st_mtime_ns for name in written}
    assert main(karpathy.arguments(out, "--resume")) == 0
    assert contents(out) == contents(whole)
    assert {name: (out / name).stat().st_mtime_ns for name in written} == before
    assert main(karpathy.arguments(out, "--resume")) == 0
    assert main(karpathy.arguments(out, "--resume", "--seed", "5")) == 2
    assert contents(out) == contents(whole)


def test_killed_build_resumes_to_the_same_bytes(karpathy: Karpathy, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    karpathy.write()
    assert main(karpathy.arguments(whole, "--shard-size", "1")) == 0
    command = [sys.executable, "-m", "d2s.shard", *karpathy.arguments(out, "--shard-size", "1")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(out.glob("train/*.tar")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for tar in out.glob("*/*.tar"):
        assert tar.read_bytes() == (whole / tar.relative_to(out)).read_bytes()
    if not (out / "checksums.json").exists():
        assert main(karpathy.arguments(out, "--shard-size", "1", "--resume")) == 0
    assert contents(out) == contents(whole)


def test_resume_of_a_complete_set_sees_other_captions(
    karpathy: Karpathy, tmp_path: Path, refused: object, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert karpathy.build(out) == 0
    for rows, field in ((karpathy.long[0], "text"), (karpathy.rows[0]["sentences"][0], "raw")):
        before, rows[field] = rows[field], "Something else."
        karpathy.write()
        assert "other captions or splits" in refused(karpathy.arguments(out, "--resume"))
        rows[field] = before
        karpathy.write()
        assert main(karpathy.arguments(out, "--resume")) == 0
        assert "complete already" in capsys.readouterr().out
    # Data sets from before the checksum of the input was kept are complete still.
    settings = json.loads((out / "build.json").read_text())
    del settings["input_sha256"]
    (out / "build.json").write_text(json.dumps(settings))
    assert main(karpathy.arguments(out, "--resume")) == 0


def test_resume_refuses_other_input(
    karpathy: Karpathy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: object
) -> None:
    def stop(_: object) -> None:
        raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "write_shard", stop)
        assert karpathy.build(tmp_path / "out") == 130
    karpathy.long[0]["text"] = "Something else."
    karpathy.write()
    assert "changed since the interrupted build" in refused(karpathy.arguments(tmp_path / "out", "--resume"))


def test_output_that_is_not_empty_is_refused(karpathy: Karpathy, tmp_path: Path, refused: object) -> None:
    karpathy.write()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("ten years of work")
    assert "not empty (holds thesis.txt)" in refused(karpathy.arguments(tmp_path / "out"))
    assert "no interrupted build" in refused(karpathy.arguments(tmp_path / "out", "--resume"))
    assert contents(tmp_path / "out") == {"thesis.txt": b"ten years of work"}


def test_resize_shrinks_the_shorter_side_and_keeps_small_files(karpathy: Karpathy, tmp_path: Path) -> None:
    large = picture(99, (120, 60))
    (karpathy.images / karpathy.rows[0]["filename"]).write_bytes(large)
    (karpathy.images / karpathy.rows[1]["filename"]).write_bytes(picture(98, (48, 96), "PNG"))
    assert karpathy.build(tmp_path / "out", "--resize", "40") == 0
    rows = {row["source_id"]: row for row in read_manifest(tmp_path / "out").to_pylist()}
    assert (rows["photo.0.jpg"]["width"], rows["photo.0.jpg"]["height"]) == (80, 40)
    assert (rows["photo.1.jpg"]["width"], rows["photo.1.jpg"]["height"]) == (40, 80)
    assert rows["photo.2.jpg"]["image_size"] == len((karpathy.images / "photo.2.jpg").read_bytes())


def test_formats_keep_their_bytes_or_become_jpeg(karpathy: Karpathy, tmp_path: Path) -> None:
    for number, form in enumerate(["PNG", "WEBP", "GIF"]):
        (karpathy.images / karpathy.rows[number]["filename"]).write_bytes(picture(number, form=form))
    assert karpathy.build(tmp_path / "out") == 0
    found = {}
    for tar in (tmp_path / "out").glob("*/*.tar"):
        with tarfile.open(tar) as members:
            found |= {m.name: m for m in members.getmembers()}
    assert {"photo_0.png", "photo_1.webp", "photo_2.jpg", "photo_3.jpg"} <= set(found)


def test_turned_photo_is_stored_upright_when_it_is_resized(karpathy: Karpathy, tmp_path: Path) -> None:
    path = karpathy.images / karpathy.rows[0]["filename"]
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        image.resize((80, 64)).save(path, exif=exif)
    assert karpathy.build(tmp_path / "out", "--resize", "32") == 0
    row = next(
        row for row in read_manifest(tmp_path / "out").to_pylist() if row["source_id"] == "photo.0.jpg"
    )
    assert (row["width"], row["height"]) == (32, 40)


def test_file_names_that_clean_to_one_key_stay_apart(karpathy: Karpathy, tmp_path: Path) -> None:
    names = ["a.b.jpg", "a_b.jpg", "a b.jpg"]
    for number, name in enumerate(names):
        (karpathy.images / name).write_bytes(picture(number))
        karpathy.rows[number]["filename"] = karpathy.long[number]["filename"] = name
    assert karpathy.build(tmp_path / "out") == 0
    rows = {row["source_id"]: row for row in read_manifest(tmp_path / "out").to_pylist()}
    assert len({rows[name]["key"] for name in names}) == 3
    assert all(rows[name]["key"].startswith("a_b-") for name in names)


def test_holdout_takes_images_from_train(karpathy: Karpathy, tmp_path: Path) -> None:
    for row in karpathy.rows:
        row["split"] = "train"
    assert karpathy.build(tmp_path / "out", "--holdout", "val=4") == 0
    splits = read_manifest(tmp_path / "out", ["split"]).column("split").to_pylist()
    assert splits == ["train"] * 11 + ["val"] * 4


@given(
    sizes=st.lists(st.integers(0, 900), min_size=1, max_size=60),
    limit=st.one_of(
        st.integers(1, 20).map(lambda n: ShardSize(samples=n)),
        st.integers(1, 2000).map(lambda n: ShardSize(samples=None, bytes=n)),
    ),
    seed=st.integers(0, 5),
)
def test_shards_cover_every_image_once_and_keep_their_size(
    sizes: list[int], limit: ShardSize, seed: int
) -> None:
    images = len(sizes)
    rng = np.random.default_rng(seed)
    splits = rng.integers(0, 3, images)
    groups = {name: rows for code, name in enumerate("abc") if len(rows := np.flatnonzero(splits == code))}
    shuffle = rng.integers(0, 2**63, images).astype(np.uint64)
    layout = Layout(shard_size=limit)
    shards, counts, order = arrange(
        groups, shuffle, np.array(sizes), (np.full(images, -1, np.int32), []), layout
    )
    assert sorted(order.tolist()) == list(range(images))
    assert sum(counts.values()) == images
    assert [shard.start for shard in shards] == [0, *[shard.stop for shard in shards[:-1]]]
    assert shards[-1].stop == images
    for shard in shards:
        held = order[shard.start : shard.stop]
        assert len(held)
        assert set(held) <= set(groups[shard.split])
        if limit.samples:
            assert len(held) <= limit.samples
        else:
            assert len(held) == 1 or sum(sizes[n] for n in held) <= limit.bytes


def test_two_builds_do_not_write_to_one_folder(karpathy: Karpathy, tmp_path: Path, refused: object) -> None:
    karpathy.write()
    scratch = tmp_path / "out" / ".build"
    scratch.mkdir(parents=True)
    with open(scratch / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another build" in refused(karpathy.arguments(tmp_path / "out", "--resume"))
    assert main(karpathy.arguments(tmp_path / "out", "--resume")) == 0


def test_workers_end_when_their_build_is_killed(tmp_path: Path) -> None:
    arguments = [
        "build",
        "--source",
        "scenes",
        "--count",
        "train=20000",
        "--shard-size",
        "5",
        "--workers",
        "2",
    ]
    command = [sys.executable, "-m", "d2s.shard", *arguments, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob("out/train/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)
    left = len(list(tmp_path.glob("out/train/*.tar")))
    time.sleep(1)
    assert len(list(tmp_path.glob("out/train/*.tar"))) == left
