"""Tables as people have them: CSV, several rows or columns of captions, JSON arrays, images inside of parquet."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_sources import picture

from d2s.shards.cli import main
from d2s.shards.format.manifest import read_manifest
from d2s.shards.read.index import ShardIndex
from d2s.shards.read.records import Record, ShardReader

COLUMNS = ["--columns", "path=image,sparse=caption"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four photos, 1.jpg to 4.jpg."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(1, 5):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    return folder


def _arguments(tmp_path: Path, source: str, captions: object, *more: object) -> list[str]:
    paths = ["--captions", captions, "--out", tmp_path / "out"]
    if "--images" not in more and (tmp_path / "images").exists():
        paths += ["--images", tmp_path / "images"]
    return ["build", "--source", source, *map(str, paths), *map(str, more)]


def _build(tmp_path: Path, source: str, captions: object, *more: object) -> dict[str, dict]:
    assert main(_arguments(tmp_path, source, captions, *more)) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    return {row["source_id"]: row for row in read_manifest(tmp_path / "out").to_pylist()}


def _sparse(found: dict[str, dict]) -> dict[str, list[str]]:
    return {name: row["sparse"] for name, row in found.items()}


def _records(out: Path) -> list[Record]:
    index = ShardIndex.open(out)
    reader = ShardReader(index)
    return [reader.record(row) for row in range(read_manifest(out).num_rows)]


def _text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("source", ["csv", "jsonl", "flickr"])
def test_kaggle_captions_are_read_by_their_header(source: str, images: Path, tmp_path: Path) -> None:
    text = 'image,caption\n1.jpg,"a dog, fast" .\n1.jpg,a dog .\n2.jpg,"a ""sign"""\n'
    found = _build(tmp_path, source, _text(tmp_path / "captions.txt", text))
    assert _sparse(found) == {"1.jpg": ["a dog, fast .", "a dog ."], "2.jpg": ['a "sign"']}


@pytest.mark.parametrize("source", ["csv", "flickr"])
def test_kaggle_results_with_bars_and_the_broken_row(
    source: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text = (
        'image_name| comment_number| comment\n1.jpg| 0| "a" dog .\n1.jpg| 1   one dog .\n2.jpg| 0| a, cat\n'
    )
    found = _build(tmp_path, source, _text(tmp_path / "results.csv", text))
    assert _sparse(found) == {"1.jpg": ['"a" dog .', "one dog ."], "2.jpg": ["a, cat"]}
    assert "results.csv: line 3: no bar behind the number 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, text, columns",
    [
        ("a.csv", 'path,sparse\n1.jpg,"a dog\nruns, fast"\n2.jpg,"a ""cat"""\n', ""),
        ("a.csv", '\ufeffid;file;text\n7;1.jpg;"a dog\nruns, fast"\n9;2.jpg;"a ""cat"""\n', "path=file,sparse=text"),
        ("a.tsv", '"a dog\nruns, fast"\t1.jpg\n"a ""cat"""\t2.jpg\n', "path=2,sparse=1"),
        ("a.csv", '1.jpg,"a dog\nruns, fast"\r\n2.jpg,"a ""cat"""\r\n', "path=1,sparse=2"),
    ],
)  # fmt: skip
def test_csv_with_any_separator_with_and_without_a_header(
    name: str, text: str, columns: str, images: Path, tmp_path: Path
) -> None:
    more = ["--columns", columns] if columns else []
    found = _build(tmp_path, "csv", _text(tmp_path / name, text), *more)
    assert _sparse(found) == {"1.jpg": ["a dog\nruns, fast"], "2.jpg": ['a "cat"']}
    if "id" in text:
        assert [row["image_id"] for row in found.values()] == [7, 9] or found["2.jpg"]["image_id"] == 9


@pytest.mark.parametrize(
    "text, expected",
    [
        ("path,sparse\n1.jpg,a dog, a cat\n", "line 2: 3 fields, but 2 columns (path, sparse)"),
        ('path,sparse\n1.jpg,"a dog\n2.jpg,a cat\n3.jpg,"a cow\n', "line 2: a quote begins here"),
        ("picture,sparse\n1.jpg,a dog\n", "no column 'path'; there are picture, sparse: --columns path="),
        ("image,caption,title\n1.jpg,a dog,x\n", "caption, title could all be 'sparse': choose one"),
        ("path,sparse,sparse\n1.jpg,a,b\n", "line 1: two columns are named 'sparse'"),
        ("url\thttps\n", "no column 'path'; there are url, https"),
        ("path\tsparse\nhttps://a.b/1.jpg\ta\n", "line 2: field 'path' is an address"),
    ],
)
def test_csv_that_could_lose_captions_is_refused(
    text: str, expected: str, images: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert expected in refused(_arguments(tmp_path, "csv", _text(tmp_path / "a.csv", text)))


def test_rows_of_one_image_are_its_captions_wherever_they_stand(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [("2.jpg", "a"), ("1.jpg", "b"), ("2.jpg", "c"), ("1.jpg", "d"), ("1.jpg", "d")]
    lines = [json.dumps({"image": image, "caption": text}) for image, text in rows]
    found = _build(tmp_path, "jsonl", _text(tmp_path / "c.jsonl", "\n".join(lines)))
    assert _sparse(found) == {"2.jpg": ["a", "c"], "1.jpg": ["b", "d", "d"]}
    assert found["2.jpg"]["image_id"] == 0
    error = capsys.readouterr().err
    assert "takes --columns path=image,sparse=caption" in error
    assert "1 rows repeat a caption of their image; kept (first: " in error


def test_row_of_lists_that_stands_twice_and_image_of_two_splits_are_named(
    images: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    row = {"path": "1.jpg", "sparse": ["a", "b"], "dense": "Long."}
    path = tmp_path / "c.jsonl"
    _text(path, f"{json.dumps(row)}\n{json.dumps(row)}\n")
    assert "c.jsonl: line 2: image '1.jpg' stands here a second time, with" in refused(
        _arguments(tmp_path, "jsonl", path)
    )
    _text(path, f"{json.dumps(row)}\n{json.dumps(row | {'split': 'val'})}\n")
    assert "line 2: image '1.jpg' stands here a second time" in refused(_arguments(tmp_path, "jsonl", path))
    _text(path, f"{json.dumps(row)}\n{json.dumps(row | {'dense': 'Longer.'})}\n")
    found = _build(tmp_path, "jsonl", path)
    assert (found["1.jpg"]["sparse"], found["1.jpg"]["dense"]) == (["a", "b"], ["Long.", "Longer."])


def test_several_caption_columns_lists_in_text_and_ids_as_floats(images: Path, tmp_path: Path) -> None:
    rows = [
        {"file_name": "1.jpg", "one": '["a dog", "a [b]"]', "two": "one dog", "number": 391895.0},
        {"file_name": "2.jpg", "one": "['a cat', \"it's\"]", "two": None, "number": 522418.0},
        {"file_name": "3.jpg", "one": "[a cow]", "two": '["broken', "number": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    dense = [{"image_id": n, "text": f"All about {n}."} for n in (391895, 522418)]
    _text(tmp_path / "dense.jsonl", "\n".join(map(json.dumps, dense)))
    more = [
        "--columns",
        "path=file_name,sparse=one,sparse=two,id=number",
        "--dense",
        tmp_path / "dense.jsonl",
    ]
    more += ["--dense-key", "image_id", "--dense-missing", "allow"]
    found = _build(tmp_path, "parquet", tmp_path / "m.parquet", *more)
    assert _sparse(found) == {
        "1.jpg": ["a dog", "a [b]", "one dog"],
        "2.jpg": ["a cat", "it's"],
        "3.jpg": ["[a cow]", '["broken'],
    }
    assert found["1.jpg"]["image_id"] == 391895
    assert found["2.jpg"]["dense"] == ["All about 522418."]


def test_array_is_read_piece_by_piece(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2s.shards.sources.json_files._CHUNK", 7)
    rows = [{"image": f"{n}.jpg", "caption": [f"a {n}", f"b, ] {n}"]} for n in range(1, 5)]
    found = _build(tmp_path, "jsonl", _text(tmp_path / "a.json", f" {json.dumps(rows, indent=1)}\n"))
    assert _sparse(found) == {f"{n}.jpg": [f"a {n}", f"b, ] {n}"] for n in range(1, 5)}


@pytest.mark.parametrize(
    "text, expected",
    [
        ('[{"path": "1.jpg",\n "sparse": oops}]', "a.json: line 2: not JSON"),
        ('[{"path": "1.jpg", "sparse": "a"}', "a.json: line 1: not JSON"),
        ('[{"path": "1.jpg", "sparse": "a"}\n{}]', "a.json: line 2: not JSON: Expecting ','"),
        ('[{"path": "1.jpg", "sparse": "a"}] {}', "more text stands behind the end"),
        ('["1.jpg"]', "a.json: row 0: not a JSON object but str"),
        ("[" * 100_000, "a.json: line 1: not JSON: nested too deeply"),
    ],
)
def test_array_that_is_not_json(
    text: str, expected: str, images: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert expected in refused(_arguments(tmp_path, "jsonl", _text(tmp_path / "a.json", text)))


def _parquet(path: Path, rows: list[dict], group: int = 2, kind: pa.DataType = IMAGE) -> Path:
    schema = pa.schema([("image", kind), ("caption", pa.list_(pa.string()))])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group)
    return path


def test_images_in_parquet_with_names_without_and_with_one_name_for_two(tmp_path: Path) -> None:
    def row(number: int, path: str | None, caption: str) -> dict:
        return {"image": {"bytes": picture(number), "path": path}, "caption": [caption]}

    rows = [row(1, "a.jpg", "1"), row(1, "a.jpg", "one"), row(2, None, "2"), row(2, None, "two")]
    rows += [row(3, "image.jpg", "3"), row(4, "image.jpg", "4")]
    found = _build(tmp_path, "parquet", _parquet(tmp_path / "t.parquet", rows))
    assert sorted(_sparse(found).values()) == [["1", "one"], ["2", "two"], ["3"], ["4"]]
    assert found["a.jpg"]["sparse"] == ["1", "one"]
    stored = {record.sparse[0]: record.image for record in _records(tmp_path / "out")}
    assert stored == {str(number): picture(number) for number in range(1, 5)}
    assert not (tmp_path / "out" / ".build").exists()


def test_parts_of_a_build_of_images_in_parquet(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": picture(n), "path": f"{n}.jpg"}, "caption": [f"{n}"]} for n in range(3)]
    arguments = _arguments(tmp_path, "parquet", _parquet(tmp_path / "t.parquet", rows), "--shard-size", "1")
    for part in ("1/2", "2/2"):
        assert main([*arguments, "--part", part]) == 0
    assert {record.key: record.image for record in _records(tmp_path / "out")} == {
        f"{n}": picture(n) for n in range(3)
    }


def test_bytes_alone_a_picture_that_is_damaged_and_no_picture(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    rows = [{"image": picture(n), "caption": [f"{n}"]} for n in range(1, 5)]
    rows[2]["image"] = rows[2]["image"][:300]
    rows[3]["image"] = None
    path = _parquet(tmp_path / "t.parquet", rows, kind=pa.binary())
    line = refused(_arguments(tmp_path, "parquet", path, *COLUMNS))
    assert "t.parquet: row 3: field 'image' is None, not text" in line
    arguments = _arguments(tmp_path, "parquet", path, "--on-error", "quarantine")
    assert main(arguments) == 0
    assert sorted(read_manifest(tmp_path / "out", ["sparse"]).column("sparse").to_pylist()) == [["1"], ["2"]]
    faults = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert "t.parquet: row 2" in faults
    assert max(map(len, faults.splitlines())) < 700


def test_interrupted_build_of_images_in_parquet_is_continued(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    good = picture(3, form="PNG")
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    images = [picture(1), picture(2), bytes(bad), picture(4)]
    rows = [
        {"image": {"bytes": data, "path": f"{n}.x"}, "caption": [f"{n}"]} for n, data in enumerate(images)
    ]
    path = _parquet(tmp_path / "t.parquet", rows)
    arguments = _arguments(tmp_path, "parquet", path, "--shard-size", "1", *COLUMNS)
    assert "does not decode" in refused(arguments)
    assert main([*arguments, "--resume", "--on-error", "quarantine"]) == 0
    assert read_manifest(tmp_path / "out").num_rows == 3


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
@pytest.mark.parametrize("folders", [("",), ("train", "val")])
def test_image_folder_of_the_hub(name: str, folders: tuple[str, ...], tmp_path: Path) -> None:
    for folder in folders:
        home = tmp_path / "photos" / folder
        home.mkdir(parents=True)
        rows = [{"file_name": f"{folder}{n}.jpg", "text": f"{folder} {n}"} for n in (1, 2)]
        for number, row in enumerate(rows):
            (home / row["file_name"]).write_bytes(picture(number))
        _write(home / name, rows)
    found = _build(tmp_path, "jsonl", tmp_path / "photos")
    expected = {f"{folder}{n}.jpg": [f"{folder} {n}".strip()] for folder in folders for n in (1, 2)}
    assert _sparse(found) == expected
    assert all(row["split"] == (name.rstrip("12.jpg") or "train") for name, row in found.items())


def _write(path: Path, rows: list[dict]) -> Path:
    """Writes rows in the form that the suffix names."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_same_photographs_in_five_forms_give_the_same_pixels_and_captions(tmp_path: Path) -> None:
    photos = {f"{n}.jpg": picture(n) for n in range(1, 7)}
    captions = {name: f'the "{name}", a photo' for name in photos}
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, data in photos.items():
        (folder / name).write_bytes(data)
    rows = [{"file_name": name, "text": text} for name, text in captions.items()]
    _write(folder / "metadata.jsonl", rows)
    embedded = [
        {"image": {"bytes": photos[name], "path": name}, "caption": [text]} for name, text in captions.items()
    ]
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "00000.tar", "w") as tar:
        for name, data in photos.items():
            for member, content in ((name, data), (name.replace("jpg", "txt"), captions[name].encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    forms = {
        "folder": ["jsonl", "--captions", folder],
        "csv": ["csv", "--captions", _write(tmp_path / "rows.csv", rows), "--images", folder],
        "parquet": ["parquet", "--captions", _parquet(tmp_path / "rows.parquet", embedded)],
        "array": ["jsonl", "--captions", _write(tmp_path / "rows.json", rows), "--images", folder],
        "tars": ["img2dataset", "--images", tmp_path / "tars"],
    }
    found = {}
    for form, arguments in forms.items():
        out = tmp_path / "out" / form
        assert main(["build", "--source", *map(str, arguments), "--out", str(out)]) == 0
        assert main(["verify", str(out)]) == 0
        rows = read_manifest(out).to_pylist()
        found[form] = {row["key"]: (row["sha256"], row["sparse"], row["dense"]) for row in rows}
        stored = {record.key: record.image for record in _records(out)}
        assert stored == {name.removesuffix(".jpg"): data for name, data in photos.items()}
    assert all(form == found["folder"] for form in found.values())
    assert found["csv"]["3"][1] == ['the "3.jpg", a photo']
