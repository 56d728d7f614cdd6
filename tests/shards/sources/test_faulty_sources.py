"""Rows that look nearly right: no caption reaches another image, and whatever is wrong has a file and a place."""

import io
import json
import tarfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_sources import picture

from d2s.shards.cli import main
from d2s.shards.format.manifest import read_manifest


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three photos, 1.jpg to 3.jpg."""
    (tmp_path / "images").mkdir()
    for number in range(1, 4):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(picture(number))
    return tmp_path / "images"


def _arguments(tmp_path: Path, source: str, captions: Path, *more: object) -> list[str]:
    paths = ["--captions", captions, "--images", tmp_path / "images", "--out", tmp_path / "out"]
    return ["build", "--source", source, *map(str, paths), *map(str, more)]


def _lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _rows(tmp_path: Path) -> dict[str, dict]:
    return {row["source_id"]: row for row in read_manifest(tmp_path / "out").to_pylist()}


def _release(tmp_path: Path, captions: str, dense: str = "") -> Path:
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "id_mapping.json").write_text(json.dumps({"1": "1.jpg", "2": "2.jpg"}))
    (folder / "train_ids.txt").write_bytes(b"1\r\n2\r\n")
    (folder / "train_caps.txt").write_bytes(captions.encode())
    if dense:
        (folder / "train.jsonl").write_bytes(dense.encode())
    return folder


def test_only_line_feeds_end_the_lines_of_a_release(images: Path, tmp_path: Path) -> None:
    dense = '{"text": "one\u2028two"}\n{"text": "three\x85four"}\r\n'
    folder = _release(tmp_path, "a\u2028A\nb\x0cB\r\nc\x1cC\nd\rD\n", dense)
    assert main(_arguments(tmp_path, "release", folder)) == 0
    rows = _rows(tmp_path)
    assert rows["1.jpg"]["sparse"] == ["a\u2028A", "b\x0cB"]
    assert rows["2.jpg"]["sparse"] == ["c\x1cC", "d\rD"]
    assert [rows[f"{n}.jpg"]["dense"] for n in (1, 2)] == [["one\u2028two"], ["three\x85four"]]


def test_lines_that_only_seemed_to_align_are_an_error(
    images: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = _release(tmp_path, "a\u2028A\nb\x0cB\nc\n")
    assert "3 lines do not align with 2 ids" in refused(_arguments(tmp_path, "release", folder))


def test_flickr_caption_keeps_its_form_feed(images: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_bytes("1.jpg#0\ta\x0cb\r\n1.jpg#1\tc\u2028d\n2.jpg#0\te".encode())
    assert main(_arguments(tmp_path, "flickr", tokens)) == 0
    rows = _rows(tmp_path)
    assert [rows[f"{n}.jpg"]["sparse"] for n in (1, 2)] == [["a\x0cb", "c\u2028d"], ["e"]]


def test_one_id_for_two_rows_is_refused(images: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    rows = [
        {"path": f"{n}.jpg", "sparse": f"a {n}", "id": name} for n, name in ((1, "q"), (2, "r"), (3, "q"))
    ]
    arguments = _arguments(tmp_path, "jsonl", _lines(tmp_path / "rows.jsonl", *rows))
    assert "rows.jsonl: line 3: key 'q' stands here a second time" in refused(arguments)
    assert main([*arguments, "--on-error", "quarantine"]) == 0
    assert sorted(_rows(tmp_path)) == ["1.jpg", "2.jpg"]


def test_ids_that_clean_to_one_key_are_told_apart(images: Path, tmp_path: Path) -> None:
    rows = [{"path": f"{n}.jpg", "sparse": f"a {n}", "id": name} for n, name in ((1, "a b"), (2, "a_b"))]
    dense = _lines(
        tmp_path / "dense.jsonl", {"key": "a_b", "text": "second"}, {"key": "a b", "text": "first"}
    )
    more = ["--dense", dense, "--dense-key", "key"]
    assert main(_arguments(tmp_path, "jsonl", _lines(tmp_path / "rows.jsonl", *rows), *more)) == 0
    assert {name: row["dense"] for name, row in _rows(tmp_path).items()} == {
        "1.jpg": ["first"], "2.jpg": ["second"]
    }  # fmt: skip


@pytest.mark.parametrize("key", ["key", "filename"])
def test_caption_that_would_fit_two_images_goes_to_neither(
    key: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "images").mkdir()
    for tar in ("0", "1"):
        _tar(tmp_path / "images" / f"{tar}.tar", {"q.jpg": picture(int(tar)), "q.txt": f"of {tar}".encode()})
    _tar(tmp_path / "images" / "2.tar", {"r.jpg": picture(2), "r.txt": b"of 2"})
    names = ("q", "r") if key == "key" else ("q.jpg", "r.jpg")
    dense = _lines(tmp_path / "dense.jsonl", *({key: name, "text": f"Of {name}."} for name in names))
    arguments = ["build", "--source", "img2dataset", "--images", str(tmp_path / "images")]
    arguments += ["--dense", str(dense), "--dense-key", key, "--out", str(tmp_path / "out")]
    line = refused(arguments)
    assert f"{key} {names[0]!r} is also that of" in line
    assert "1.tar: q" in line
    assert main([*arguments, "--on-error", "quarantine"]) == 0
    assert {name: row["dense"] for name, row in _rows(tmp_path).items()} == {"2/r.jpg": [f"Of {names[1]}."]}


def test_copies_of_an_image_share_what_is_joined_by_their_checksum(images: Path, tmp_path: Path) -> None:
    (images / "2.jpg").write_bytes(picture(1))
    rows = _lines(tmp_path / "rows.jsonl", *({"path": f"{n}.jpg", "sparse": f"a {n}"} for n in (1, 2)))
    dense = _lines(tmp_path / "d.jsonl", {"sha256": sha256(picture(1)).hexdigest(), "text": "Both."})
    assert main(_arguments(tmp_path, "jsonl", rows, "--dense", dense, "--dense-key", "sha256")) == 0
    assert [row["dense"] for row in _rows(tmp_path).values()] == [["Both."], ["Both."]]


@pytest.mark.parametrize("missing", ["stop", "allow"])
def test_row_with_an_empty_list_of_dense_captions_is_a_fault(
    missing: str, images: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    rows = _lines(tmp_path / "rows.jsonl", *({"path": f"{n}.jpg", "sparse": f"a {n}"} for n in (1, 2)))
    dense = [{"filename": "1.jpg", "text": ["long"]}, {"filename": "2.jpg", "text": []}]
    more = ["--dense", _lines(tmp_path / "dense.jsonl", *dense), "--dense-missing", missing]
    line = refused(_arguments(tmp_path, "jsonl", rows, *more))
    assert "dense.jsonl: line 2: filename '2.jpg': no caption in text" in line


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_column_that_the_user_named_has_to_be_there(
    source: str, images: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    rows = [{"path": f"{n}.jpg", "dense": f"All about {n}.", "caption": f"a {n}"} for n in (1, 2)]
    path = _lines(tmp_path / "rows.jsonl", *rows)
    if source == "parquet":
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    line = refused(_arguments(tmp_path, source, path, "--columns", "sparse=capt"))
    assert "no field 'capt', which --columns names; there are caption, dense, path" in line
    assert main(_arguments(tmp_path, source, path, "--columns", "sparse=caption")) == 0
    assert _rows(tmp_path)["2.jpg"]["sparse"] == ["a 2"]


def _tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("command", ["build", "index"])
@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"caption": 5}', "'caption' is neither a text nor a list of texts: '5'"),
        ('{"sparse": 7}', "'sparse' is neither a text"),
        ('{"sparse": {"a dog": 1}}', "'sparse' is neither a text"),
        ('{"dense": ["whole", 1]}', "'dense' is neither a text"),
        ("[" * 100_000, "nested too deeply"),
        ('["a dog"]', "the JSON is not an object"),
    ],
)
def test_member_of_a_tar_with_other_types_is_named_or_left_out(
    text: str, expected: str, command: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "tars").mkdir()
    members = {"1.jpg": picture(1), "1.json": b'{"sparse": "a dog", "dense": null}'}
    _tar(tmp_path / "tars" / "0.tar", members | {"2.jpg": picture(2), "2.json": text.encode()})
    arguments = ["index", str(tmp_path / "tars")]
    out = tmp_path / "tars"
    if command == "build":
        out = tmp_path / "out"
        arguments = [
            "build",
            "--source",
            "img2dataset",
            "--images",
            str(tmp_path / "tars"),
            "--out",
            str(out),
        ]
    line = refused(arguments)
    assert "0.tar: 2: " in line
    assert expected in line
    assert not (out / ".build").exists()
    assert main([*arguments, "--on-error", "quarantine"]) == 0
    assert read_manifest(out, ["sparse"]).column("sparse").to_pylist() == [["a dog"]]
    assert expected in (out / "quarantine.jsonl").read_text()


@pytest.mark.parametrize("line", ['"some text"', '["text"]', "7", '{"text": []}', "[" * 100_000])
def test_dense_line_of_a_release_that_is_no_object_with_a_text(
    line: str, images: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = _release(tmp_path, "a\nb\n", f'{{"text": "long"}}\n{line}\n')
    arguments = _arguments(tmp_path, "release", folder)
    assert "train.jsonl: line 2: not a JSON object with a text: " in refused(arguments)
    assert main([*arguments, "--on-error", "quarantine"]) == 0
    assert list(_rows(tmp_path)) == ["1.jpg"]


@pytest.mark.parametrize("value", ["Infinity", '"x1"', "true", "1.5", "null", "[]"])
@pytest.mark.parametrize("place", ["images", "annotations"])
def test_coco_id_that_is_no_whole_number(
    place: str, value: str, images: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    coco = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in (2, 1)],
        "annotations": [{"id": n, "image_id": n, "caption": f"a {n}"} for n in (2, 1)],
    }
    coco[place][1]["id"] = "HERE"
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco).replace('"HERE"', value))
    line = refused(_arguments(tmp_path, "coco", path))
    assert f"coco.json: {place}[1]: field 'id' is " in line
    assert "not a whole number" in line


def _karpathy(tmp_path: Path, **fields: object) -> Path:
    rows = [
        {"filename": f"{n}.jpg", "split": "train", "imgid": n + 5, "sentences": [{"raw": f"a {n}"}]}
        for n in (1, 2)
    ]
    rows[1] |= fields
    path = tmp_path / "karpathy.json"
    path.write_text(json.dumps({"images": rows}))
    return path


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"imgid": True}, "image id True is not a whole number"),
        ({"filename": "a\0b.jpg"}, r"a\x00b.jpg': no file name holds a zero byte"),
    ],
)
def test_karpathy_image_with_a_name_or_id_that_cannot_be(
    fields: dict, expected: str, images: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    arguments = _arguments(tmp_path, "karpathy", _karpathy(tmp_path, **fields))
    line = refused(arguments)
    assert "karpathy.json: images[1]: " in line
    assert expected in line
    assert main([*arguments, "--on-error", "quarantine"]) == 0
    assert list(_rows(tmp_path)) == ["1.jpg"]


@pytest.mark.parametrize("value", [True, ["a"], "half a pair \ud83d"])
def test_table_id_that_is_no_name(
    value: object, images: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"path": "1.jpg", "sparse": "a", "id": value}))
    assert "rows.jsonl: line 1: field 'id' is " in refused(_arguments(tmp_path, "jsonl", path))


def test_deeply_nested_json_is_named(images: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    for source in ("karpathy", "coco"):
        assert "deep.json: not JSON: nested too deeply" in refused(_arguments(tmp_path, source, path))
    assert "deep.json: line 1: not JSON: nested too deeply" in refused(_arguments(tmp_path, "jsonl", path))


def test_tar_member_whose_name_is_not_utf8_has_a_key_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    members = {"ok.jpg": picture(1), "ok.txt": b"a", "b\udcff.jpg": picture(2), "b\udcff.txt": b"b"}
    _tar(tmp_path / "tars" / "0.tar", members)
    assert main(["index", str(tmp_path / "tars")]) == 0
    rows = {row["source_id"]: row for row in read_manifest(tmp_path / "tars").to_pylist()}
    assert {name: (row["key"], row["sparse"]) for name, row in rows.items()} == {
        "0/ok.jpg": ("ok", ["a"]),
        "0/b%FF.jpg": ("b_FF", ["b"]),
    }
