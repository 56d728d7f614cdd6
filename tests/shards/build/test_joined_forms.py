"""Dense captions as people have them: folders in names, several rows an image, conversations, CSV, arrays."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_sources import picture

from d2s.shards.cli import main
from d2s.shards.format.manifest import read_manifest


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """JSON lines of three photos: a/1.jpg, a/2.jpg, 3.jpg, with ids 11, 12, 13."""
    names = ("a/1.jpg", "a/2.jpg", "3.jpg")
    (tmp_path / "images" / "a").mkdir(parents=True)
    rows = []
    for number, name in enumerate(names, 1):
        (tmp_path / "images" / name).write_bytes(picture(number))
        rows.append(json.dumps({"path": name, "sparse": f"a {number}", "id": 10 + number}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    return tmp_path / "rows.jsonl"


def _arguments(table: Path, dense: Path, *more: object) -> list[str]:
    home = table.parent
    paths = ["--captions", table, "--images", home / "images", "--out", home / "out", "--dense", dense]
    return ["build", "--source", "jsonl", *map(str, (*paths, *more))]


def _dense(table: Path, dense: Path, *more: object) -> dict[str, list[str]]:
    assert main(_arguments(table, dense, *more)) == 0
    return {row["source_id"]: row["dense"] for row in read_manifest(table.parent / "out").to_pylist()}


def _lines(path: Path, *rows: tuple[str, object]) -> Path:
    path.write_text("".join(json.dumps({"filename": name, "text": text}) + "\n" for name, text in rows))
    return path


def test_names_that_only_one_side_writes_with_folders(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    dense = _lines(tmp_path / "d.jsonl", ("1.jpg", "One."), ("coco/a/2.jpg", "Two."), ("b\\3.jpg", "Three."))
    assert _dense(table, dense) == {"a/1.jpg": ["One."], "a/2.jpg": ["Two."], "3.jpg": ["Three."]}
    note = "3 names were joined without their folders ('1.jpg' with 'a/1.jpg', "
    assert note in capsys.readouterr().err


def test_name_without_folder_that_fits_two_images_is_refused(
    table: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "images" / "b").mkdir()
    (tmp_path / "images" / "b" / "1.jpg").write_bytes(picture(5))
    with open(table, "a") as file:
        file.write('\n{"path": "b/1.jpg", "sparse": "b"}\n')
    dense = _lines(tmp_path / "d.jsonl", ("1.jpg", "One."))
    assert "filename '1.jpg' fits several images; write it with its folder" in refused(
        _arguments(table, dense)
    )
    dense = _lines(tmp_path / "d.jsonl", ("x/y/1.jpg", "One."))
    line = refused(_arguments(table, dense))
    assert "'x/y/1.jpg' belongs to no image; an image here is 'a/1.jpg'" in line


def test_further_rows_of_an_image_are_refused_or_added(
    table: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    rows = [("a/1.jpg", "Short."), ("a/2.jpg", "Two."), ("3.jpg", ["Three.", "Four."]), ("a/1.jpg", "Long.")]
    dense = _lines(tmp_path / "d.jsonl", *rows, ("a/1.jpg", "Short."), ("a/1.jpg", "Longer."))
    line = refused(_arguments(table, dense))
    assert "line 4: filename 'a/1.jpg' stands here a second time; --dense-repeated allow adds" in line
    found = _dense(table, dense, "--dense-repeated", "allow")
    assert found == {
        "a/1.jpg": ["Short.", "Long.", "Longer."],
        "a/2.jpg": ["Two."],
        "3.jpg": ["Three.", "Four."],
    }


@pytest.mark.parametrize("form", ["csv", "json", "jsonl.gz", "parquet"])
def test_dense_captions_in_every_form(form: str, table: Path, tmp_path: Path) -> None:
    rows = [{"image_id": 10.0 + n, "text": f'All, "about" {n}.'} for n in (1, 2, 3)]
    path = tmp_path / f"dense.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "csv":
        path.write_text("image_id,text\n" + "".join(f'1{n}.0,"All, ""about"" {n}."\n' for n in (1, 2, 3)))
    elif form == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    found = _dense(table, path, "--dense-key", "image_id")
    assert found == {
        name: [f'All, "about" {n}.'] for n, name in enumerate(("a/1.jpg", "a/2.jpg", "3.jpg"), 1)
    }


@pytest.mark.parametrize(
    "names", [("from", "value", "human", "gpt"), ("role", "content", "user", "assistant")]
)
def test_answers_of_conversations_are_dense_captions(
    names: tuple[str, ...], table: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    who, what, human, model = names
    turns = [{who: human, what: "<image>\nDescribe."}, {who: model, what: " A long text. "}]
    rows = [{"id": "x", "image": name, "conversations": turns} for name in ("a/1.jpg", "a/2.jpg", "3.jpg")]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(rows, indent=1))
    more = ["--dense-key-column", "image", "--dense-columns", "conversations"]
    assert set(map(tuple, _dense(table, path, *more).values())) == {("A long text.",)}
    (tmp_path / "out").rename(tmp_path / "first")
    rows[1]["conversations"] = turns[:1]
    path.write_text(json.dumps(rows))
    assert "row 1: filename 'a/2.jpg': no caption in conversations" in refused(_arguments(table, path, *more))
