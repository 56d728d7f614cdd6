"""Compressed files, byte-order marks, files of another source, COCO's and the release's layouts of others."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_sources import picture

from d2s.shards.cli import main
from d2s.shards.format.manifest import read_manifest

COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three photos, 1.jpg to 3.jpg."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(1, 4):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    return folder


def _arguments(tmp_path: Path, source: str, captions: Path, *more: object) -> list[str]:
    paths = ["--captions", captions, "--images", tmp_path / "images", "--out", tmp_path / "out"]
    return ["build", "--source", source, *map(str, paths), *map(str, more)]


def _build(tmp_path: Path, source: str, captions: Path, *more: object) -> dict[str, dict]:
    assert main(_arguments(tmp_path, source, captions, *more)) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    return {row["source_id"]: row for row in read_manifest(tmp_path / "out").to_pylist()}


TEXTS = {
    "flickr": "1.jpg#0\ta dog\n2.jpg#0\ta cat\n",
    "csv": "image,caption\n1.jpg,a dog\n2.jpg,a cat\n",
    "jsonl": '{"path": "1.jpg", "sparse": "a dog"}\n{"path": "2.jpg", "sparse": "a cat"}\n',
    "array": '[{"path": "1.jpg", "sparse": "a dog"}, {"path": "2.jpg", "sparse": "a cat"}]',
    "karpathy": json.dumps(
        {
            "images": [
                {"filename": f"{n}.jpg", "split": "train", "imgid": n, "sentences": [{"raw": text}]}
                for n, text in ((1, "a dog"), (2, "a cat"))
            ]
        }
    ),
    "coco": json.dumps(
        {
            "images": [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2)],
            "annotations": [
                {"id": n, "image_id": n, "caption": text} for n, text in ((1, "a dog"), (2, "a cat"))
            ],
        }
    ),
}


@pytest.mark.parametrize("form", TEXTS)
@pytest.mark.parametrize("compressed", ["", *COMPRESS])
def test_every_text_file_with_a_byte_order_mark_and_compressed(
    form: str, compressed: str, images: Path, tmp_path: Path
) -> None:
    data = b"\xef\xbb\xbf" + TEXTS[form].encode()
    path = tmp_path / f"captions.{compressed or 'txt'}"
    path.write_bytes(COMPRESS[compressed](data) if compressed else data)
    more = []
    if form == "flickr":
        for split, name in (("train", "1.jpg"), ("val", "2.jpg")):
            lines = b"\xef\xbb\xbf" + name.encode() + b"\r\n"
            (tmp_path / split).write_bytes(COMPRESS[compressed](lines) if compressed else lines)
        more = ["--split-lists", f"train={tmp_path / 'train'},val={tmp_path / 'val'}"]
    found = _build(tmp_path, "jsonl" if form == "array" else form, path, *more)
    assert {name: row["sparse"] for name, row in found.items()} == {"1.jpg": ["a dog"], "2.jpg": ["a cat"]}


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_file_that_is_cut_short(
    kind: str, images: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / f"a.{kind}").write_bytes(COMPRESS[kind](TEXTS["jsonl"].encode() * 500)[:-9])
    assert f"a.{kind}: " in refused(_arguments(tmp_path, "jsonl", tmp_path / f"a.{kind}"))


@pytest.mark.parametrize("source", ["karpathy", "coco", "flickr"])
@pytest.mark.parametrize("form", ["csv", "jsonl", "array", "parquet", "karpathy", "coco"])
def test_file_of_another_source_is_named_with_its_source(
    source: str, form: str, images: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = tmp_path / "captions"
    if form == "parquet":
        pq.write_table(pa.table({"path": ["1.jpg"], "sparse": ["a dog"]}), path)
    else:
        path.write_text(TEXTS[form].replace("image,", "picture,") if form == "csv" else TEXTS[form])
    if form != source:
        line = refused(_arguments(tmp_path, source, path))
        assert "captions" in line
        right = {"array": "jsonl"}.get(form, form)
        assert f"--source {right} reads it" in line or f"are read by --source {right}" in line


@pytest.mark.parametrize("form", ["karpathy", "coco"])
@pytest.mark.parametrize("indent", [None, 1])
def test_json_lines_that_are_one_object(
    form: str, indent: int | None, images: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "c.json").write_text(json.dumps(json.loads(TEXTS[form]), indent=indent))
    line = refused(_arguments(tmp_path, "jsonl", tmp_path / "c.json"))
    assert f"--source {form}" in line


def test_utf16_is_named(images: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "c.csv").write_bytes(TEXTS["csv"].encode("utf-16"))
    line = refused(_arguments(tmp_path, "csv", tmp_path / "c.csv"))
    assert "not UTF-8 text but UTF-16; save it as UTF-8" in line


def test_annotation_that_stands_twice_counts_once(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture, refused: Callable[..., str]
) -> None:
    coco = json.loads(TEXTS["coco"])
    coco["annotations"] += [dict(coco["annotations"][0]), {"id": 9, "image_id": 1, "caption": "a dog"}]
    path = tmp_path / "c.json"
    path.write_text(json.dumps(coco))
    assert _build(tmp_path, "coco", path)["1.jpg"]["sparse"] == ["a dog", "a dog"]
    assert "1 annotations stand there twice; each is taken once (first: " in capsys.readouterr().err
    coco["annotations"].append({"id": 9, "image_id": 2, "caption": "another"})
    path.write_text(json.dumps(coco))
    (tmp_path / "out").rename(tmp_path / "first")
    assert "annotations[4]: annotation id 9 stands here a second time" in refused(
        _arguments(tmp_path, "coco", path)
    )


def test_photographs_of_coco_in_the_folders_of_the_other_release(tmp_path: Path) -> None:
    for number, folder in enumerate(("train2017", "val2017", "val2014")):
        home = tmp_path / "images" / folder
        home.mkdir(parents=True)
        name = f"{number:012}.jpg" if "2017" in folder else f"COCO_val2014_{number:012}.jpg"
        (home / name).write_bytes(picture(number))
    rows = [
        {
            "filename": f"COCO_val2014_{n:012}.jpg",
            "filepath": "val2014",
            "split": "train",
            "cocoid": n,
            "sentences": [{"raw": f"a {n}"}],
        }
        for n in range(3)
    ]
    path = tmp_path / "k.json"
    path.write_text(json.dumps({"images": rows}))
    found = _build(tmp_path, "karpathy", path)
    assert found["COCO_val2014_000000000001.jpg"]["sparse"] == ["a 1"]
    (tmp_path / "out").rename(tmp_path / "first")
    coco = {
        "images": [{"id": n, "file_name": f"{n:012}.jpg"} for n in range(3)],
        "annotations": [{"id": n, "image_id": n, "caption": f"a {n}"} for n in range(3)],
    }
    path = tmp_path / "captions_train2017.json"
    path.write_text(json.dumps(coco))
    assert len(_build(tmp_path, "coco", path)) == 3


@pytest.mark.parametrize("quarantine", [False, True])
def test_repeated_ids_of_a_release_are_one_image(
    quarantine: bool, images: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "precomp"
    folder.mkdir()
    (folder / "train_ids.txt").write_text("7\n8\n7\n7\n9\n8\n")
    (folder / "train_caps.txt").write_text("a\nb\nc\nd\ne\nf\n")
    (folder / "id_mapping.json").write_text(json.dumps({"7": "1.jpg", "8": "2.jpg", "9": "3.jpg"}))
    dense = folder / "train.jsonl"
    dense.write_text("".join(f'{{"text": "Long {n}."}}\n' for n in (7, 8, 9)))
    more = ["--on-error", "quarantine"] if quarantine else []
    found = _build(tmp_path, "release", folder, *more)
    assert {row["image_id"]: row["sparse"] for row in found.values()} == {
        7: ["a", "c", "d"],
        8: ["b", "f"],
        9: ["e"],
    }
    assert {row["image_id"]: row["dense"] for row in found.values()} == {n: [f"Long {n}."] for n in (7, 8, 9)}
    assert not (tmp_path / "out" / "quarantine.jsonl").exists()
    (tmp_path / "out").rename(tmp_path / "first")
    names = folder / "train_ids.txt"
    names.with_name("train_ids.txt.gz").write_bytes(gzip.compress(names.read_bytes()))
    names.unlink()
    dense.write_text(dense.read_text() * 2)
    assert "6 lines do not align with 3 distinct ids" in refused(
        _arguments(tmp_path, "release", folder, *more)
    )
