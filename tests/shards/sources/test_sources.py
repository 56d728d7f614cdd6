"""Each layout that users bring gives the samples that it means."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from shard_sources import picture

from d2s.shards.cli import main
from d2s.shards.format.manifest import read_manifest


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eight photos, 1.jpg to 8.jpg."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(1, 9):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    return folder


def _build(tmp_path: Path, source: str, *arguments: object) -> dict[str, dict]:
    out = tmp_path / "out"
    assert main(["build", "--source", source, "--out", str(out), *map(str, arguments)]) == 0
    assert main(["verify", str(out), "--no-decode"]) == 0
    return {row["source_id"]: row for row in read_manifest(out).to_pylist()}


def test_karpathy_restval_is_train_and_filepath_is_a_folder(images: Path, tmp_path: Path) -> None:
    rows = [
        {
            "filename": "1.jpg",
            "filepath": "val2014",
            "split": "restval",
            "cocoid": 11,
            "sentences": [{"raw": " a "}],
        },
        {
            "filename": "2.jpg",
            "filepath": "elsewhere",
            "split": "val",
            "cocoid": 12,
            "sentences": [{"raw": "b"}],
        },
    ]
    (images / "val2014").mkdir()
    (images / "1.jpg").rename(images / "val2014" / "1.jpg")
    (tmp_path / "k.json").write_text(json.dumps({"images": rows}))
    found = _build(tmp_path, "karpathy", "--captions", tmp_path / "k.json", "--images", images)
    assert found["1.jpg"]["split"] == "train"
    assert (found["1.jpg"]["image_id"], found["1.jpg"]["sparse"]) == (11, ["a"])
    assert found["2.jpg"]["split"] == "val"


def _coco(path: Path, numbers: range, strays: int = 0) -> Path:
    captions = [
        {"id": 1000 - 10 * n - c, "image_id": n, "caption": f"{c} of {n}"} for n in numbers for c in range(3)
    ]
    captions += [{"id": 2000 + n, "image_id": 77, "caption": "of nothing"} for n in range(strays)]
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in numbers]
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    return path


def test_coco_files_are_splits_and_captions_stand_by_annotation_id(
    images: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    train, val = (
        _coco(tmp_path / "captions_train2017.json", range(1, 6)),
        _coco(tmp_path / "b.json", range(6, 9)),
    )
    (images / "train2017").mkdir()
    for number in range(1, 6):
        (images / f"{number}.jpg").rename(images / "train2017" / f"{number}.jpg")
    found = _build(tmp_path, "coco", "--captions", train, f"val={val}", "--images", images)
    assert [found[f"{n}.jpg"]["split"] for n in (1, 5, 6, 8)] == ["train", "train", "val", "val"]
    assert found["4.jpg"]["sparse"] == ["2 of 4", "1 of 4", "0 of 4"]
    assert found["4.jpg"]["image_id"] == 4
    stray = _coco(tmp_path / "stray.json", range(6, 9), strays=1)
    line = refused(
        [
            "build",
            "--source",
            "coco",
            "--captions",
            str(stray),
            "--images",
            str(images),
            "--out",
            str(tmp_path / "o"),
        ]
    )
    assert "annotations[9]: caption without an image: image_id 77" in line


def test_split_on_the_command_line_beats_a_file_s_name(images: Path, tmp_path: Path) -> None:
    captions = _coco(tmp_path / "captions_val2017.json", range(1, 4))
    found = _build(tmp_path, "coco", "--captions", captions, "--images", images, "--split", "train")
    assert {row["split"] for row in found.values()} == {"train"}


def test_flickr_token_file_with_split_lists(
    images: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    tokens = tmp_path / "results.token"
    tokens.write_text("".join(f"{n}.jpg#{c}\tcaption {c} of {n}\n" for n in range(1, 9) for c in range(2)))
    (tmp_path / "train.txt").write_text("".join(f"{n}.jpg\n" for n in range(1, 5)))
    (tmp_path / "val.txt").write_text("5\n6\n")
    lists = f"train={tmp_path / 'train.txt'},val={tmp_path / 'val.txt'}"
    found = _build(tmp_path, "flickr", "--captions", tokens, "--images", images, "--split-lists", lists)
    assert sorted(found) == [f"{n}.jpg" for n in range(1, 7)]
    assert found["5.jpg"]["split"] == "val"
    assert found["5.jpg"]["sparse"] == ["caption 0 of 5", "caption 1 of 5"]
    (tmp_path / "val.txt").write_text("\n")
    again = ["build", "--source", "flickr", "--captions", str(tokens), "--images", str(images)]
    again += ["--split-lists", lists, "--out", str(tmp_path / "again")]
    assert "val.txt: split 'val' is empty" in refused(again)
    (tmp_path / "val.txt").write_text("5\nghost\n")
    assert "val.txt: line 2: image 'ghost' has no caption" in refused(again)


def _release(folder: Path) -> Path:
    folder.mkdir()
    (folder / "id_mapping.json").write_text(json.dumps({str(100 + n): f"{n}.jpg" for n in range(1, 9)}))
    for name, numbers in (("train", range(1, 5)), ("dev", range(5, 7)), ("testall", range(7, 9))):
        (folder / f"{name}_ids.txt").write_text("".join(f"{100 + n}\n" for n in numbers))
        captions = [f"caption {c} of {n}\n" for n in numbers for c in range(5)]
        (folder / f"{name}_caps.txt").write_text("".join(captions))
    lines = [json.dumps({"text": f"All about {n}."}) for n in range(1, 5)]
    (folder / "f30k_train.jsonl").write_text("\n".join(lines))
    (folder / "f30k_train_short200.jsonl").write_text("not asked for")
    return folder


def test_release_files_are_aligned_by_line(images: Path, tmp_path: Path) -> None:
    found = _build(tmp_path, "release", "--captions", _release(tmp_path / "f30k"), "--images", images)
    assert {name: row["split"] for name, row in found.items()} == {
        f"{n}.jpg": "train" if n < 5 else "val" if n < 7 else "test" for n in range(1, 9)
    }
    for number in range(1, 9):
        row = found[f"{number}.jpg"]
        assert row["image_id"] == 100 + number
        assert row["sparse"] == [f"caption {c} of {number}" for c in range(5)]
        assert row["dense"] == ([f"All about {number}."] if number < 5 else [])


@pytest.mark.parametrize("quarantine", [False, True])
@pytest.mark.parametrize(
    "name, spoil, expected",
    [
        ("train_caps.txt", lambda text: text + "one more\n", "21 lines do not align with 4 ids"),
        ("f30k_train.jsonl", lambda text: text.rsplit("\n", 1)[0], "3 lines do not align with 4 ids"),
        ("dev_ids.txt", lambda _: "", "split 'val' is empty"),
    ],
)
def test_release_lines_that_do_not_align_are_always_an_error(
    name: str,
    spoil: Callable[[str], str],
    expected: str,
    quarantine: bool,
    images: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    folder = _release(tmp_path / "f30k")
    (folder / name).write_text(spoil((folder / name).read_text()))
    arguments = ["build", "--source", "release", "--captions", str(folder), "--images", str(images)]
    arguments += ["--out", str(tmp_path / "out"), *(["--on-error", "quarantine"] if quarantine else [])]
    line = refused(arguments)
    assert expected in line
    assert name in line


def test_release_line_that_is_not_json_shifts_no_caption(images: Path, tmp_path: Path) -> None:
    folder = _release(tmp_path / "f30k")
    lines = (folder / "f30k_train.jsonl").read_text().splitlines()
    (folder / "f30k_train.jsonl").write_text("\n".join([lines[0], "{oops", *lines[2:]]))
    arguments = ["--captions", folder, "--images", images, "--on-error", "quarantine"]
    found = _build(tmp_path, "release", *arguments)
    assert "2.jpg" not in found
    assert all(
        row["dense"] == [f"All about {name[0]}."] for name, row in found.items() if row["split"] == "train"
    )


def test_rows_in_json_lines_and_parquet_give_the_same_samples(images: Path, tmp_path: Path) -> None:
    rows = [
        {
            "image": f"{n}.jpg",
            "sparse": [f"a {n}", f"b {n}"],
            "dense": f"All about {n}.",
            "split": "train",
            "id": n,
        }
        for n in range(1, 9)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = []
    for source in ("jsonl", "parquet"):
        file = ["--captions", tmp_path / f"rows.{source}", "--images", images, "--columns", "path=image"]
        found.append(_build(tmp_path / source, source, *file))
    assert found[0] == found[1]
    assert found[0]["3.jpg"]["sparse"] == ["a 3", "b 3"]
    assert found[0]["3.jpg"]["dense"] == ["All about 3."]
    assert found[0]["3.jpg"]["image_id"] == 3


def test_row_without_a_path_is_a_caption_without_an_image(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"sparse": "alone"}\n')
    arguments = ["build", "--source", "jsonl", "--captions", str(tmp_path / "rows.jsonl")]
    line = refused([*arguments, "--out", str(tmp_path / "out")])
    assert "rows.jsonl: line 1: caption without an image" in line


def _img2dataset(folder: Path, shards: int = 2, each: int = 3) -> Path:
    """Tars as img2dataset leaves them, with statistics and parquet beside them."""
    folder.mkdir()
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for number in range(each):
                key = f"{shard:05d}{number:04d}"
                facts = {
                    "key": key,
                    "sha256": f"{shard}{number}" * 32,
                    "caption": f"alt of {key}",
                    "status": "success",
                }
                sample = {
                    "__key__": key,
                    "jpg": picture(10 * shard + number),
                    "txt": f"alt of {key}",
                    "json": facts,
                }
                writer.write(sample)
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        pq.write_table(pa.table({"key": [shard]}), folder / f"{shard:05d}.parquet")
    return folder


@pytest.mark.parametrize("key", ["key", "sha256"])
@pytest.mark.parametrize("command", ["build", "index"])
def test_recaptions_in_parquet_join_img2dataset_tars_as_they_are(
    command: str, key: str, tmp_path: Path
) -> None:
    tars = _img2dataset(tmp_path / "tars")
    (tmp_path / "recap").mkdir()
    for part in range(2):
        rows = [
            {
                "key": f"{shard:05d}{number:04d}",
                "sha256": f"{shard}{number}" * 32,
                "re_caption": f"All about {shard} {number}.",
                "org_caption": f"org of {shard} {number}",
                "url": "http://unused",
            }
            for shard in (1, 0)
            for number in range(3)
            if (shard + number) % 2 == part
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "recap" / f"train-{part}.parquet")
    dense = ["--dense", tmp_path / "recap", "--dense-key", key, "--dense-columns", "re_caption"]
    dense += ["--sparse-columns", "org_caption"]
    if command == "build":
        found = _build(tmp_path, "img2dataset", "--images", tars, *dense, "--workers", 2)
    else:
        assert main(["index", str(tars), *map(str, dense)]) == 0
        assert main(["verify", str(tars)]) == 0
        found = {row["source_id"]: row for row in read_manifest(tars).to_pylist()}
    assert len(found) == 6
    for shard in range(2):
        for number in range(3):
            row = found[f"{shard:05d}/{shard:05d}{number:04d}.jpg"]
            assert row["key"] == f"{shard:05d}{number:04d}"
            assert row["dense"] == [f"All about {shard} {number}."]
            assert row["sparse"] == [f"org of {shard} {number}"]


def test_img2dataset_without_recaptions_has_the_alt_text(tmp_path: Path, refused: Callable[..., str]) -> None:
    tars = _img2dataset(tmp_path / "tars")
    found = _build(tmp_path, "img2dataset", "--images", tars, "--holdout", "val=2")
    assert found["00001/000010002.jpg"]["sparse"] == ["alt of 000010002"]
    assert sorted(row["split"] for row in found.values()) == ["train"] * 4 + ["val"] * 2
    again = ["build", "--source", "img2dataset", "--images", str(tars), "--out", str(tmp_path / "again")]
    assert "leaves nothing of the 6 images" in refused([*again, "--holdout", "val=6"])
    (tars / "00001.tar").write_bytes((tars / "00001.tar").read_bytes()[:3000])
    assert "00001.tar" in refused(again)


def _tar(path: Path, members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            info.linkname = "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("name", ["../1.jpg", "/etc/1.jpg", "a/../../1.jpg", "C:/1.jpg", "..\\1.jpg"])
def test_tar_whose_members_lead_outside_is_refused(
    name: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "tars").mkdir()
    _tar(tmp_path / "tars" / "0.tar", {name: picture(0)})
    assert "leads outside" in refused(["index", str(tmp_path / "tars")])


def test_tar_with_a_link_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "tars").mkdir()
    _tar(tmp_path / "tars" / "0.tar", {"1.jpg": b""}, tarfile.SYMTYPE)
    assert "link or device" in refused(["index", str(tmp_path / "tars")])


def test_scenes_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    arguments = ["--count", "train=12,val=4,test=4", "--size", "32", "--shard-size", "5"]
    one = _build(tmp_path / "1", "scenes", *arguments)
    two = _build(tmp_path / "2", "scenes", *arguments, "--workers", "2")
    assert one == two
    assert len(one) == 20
    assert all(
        len(row["sparse"]) == 5 and len(row["dense"]) == 1 and row["width"] == 32 for row in one.values()
    )
