"""Bad input is named: one line with file and place, before any shard is written; or listed and left out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from shard_sources import Karpathy, contents, picture

from d2s.shards.cli import main
from d2s.shards.format.manifest import read_manifest


def _missing_image(source: Karpathy) -> str:
    (source.images / "photo.3.jpg").unlink()
    return "photo.3.jpg does not exist"


def _truncated_image(source: Karpathy) -> str:
    path = source.images / "photo.3.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    return "photo.3.jpg: the image does not decode"


def _empty_image(source: Karpathy) -> str:
    (source.images / "photo.3.jpg").write_bytes(b"")
    return "photo.3.jpg: the image file is empty"


def _not_an_image(source: Karpathy) -> str:
    (source.images / "photo.3.jpg").write_bytes(b"<html>404 not found</html>")
    return "photo.3.jpg: the image does not decode: no known image format"


def _folder_as_image(source: Karpathy) -> str:
    (source.images / "photo.3.jpg").unlink()
    (source.images / "photo.3.jpg").mkdir()
    return "photo.3.jpg: Is a directory"


def _unknown_dense(source: Karpathy) -> str:
    source.long.insert(3, {"filename": "nobody.jpg", "text": "A stranger."})
    return "dense.jsonl: line 4: filename 'nobody.jpg' belongs to no image"


def _double_dense(source: Karpathy) -> str:
    source.long.insert(5, {"filename": "photo.3.jpg", "text": "Another opinion."})
    return "dense.jsonl: line 6: filename 'photo.3.jpg' stands here a second time"


def _missing_dense(source: Karpathy) -> str:
    del source.long[3]
    return "photo.3.jpg has no row here"


def _empty_dense(source: Karpathy) -> str:
    source.long[3]["text"] = " \n"
    return "dense.jsonl: line 4: filename 'photo.3.jpg': caption 0 is empty"


def _no_dense_column(source: Karpathy) -> str:
    source.long[3] = {"filename": "photo.3.jpg", "caption": "misnamed"}
    return "dense.jsonl: line 4: no field 'text'; there are caption, filename"


def _empty_caption(source: Karpathy) -> str:
    source.rows[3]["sentences"][1]["raw"] = "  "
    return "images[3]: caption 1 is empty"


def _number_as_caption(source: Karpathy) -> str:
    source.rows[3]["sentences"][0]["raw"] = 7
    return "images[3]: caption 0 is int, not text"


def _broken_unicode(source: Karpathy) -> str:
    source.rows[3]["sentences"][0]["raw"] = "half a pair \ud83d"
    return "images[3]: caption 0 is not valid Unicode"


def _double_image(source: Karpathy) -> str:
    source.rows.append({**source.rows[3], "imgid": 999, "split": "test"})
    return "images[15]: image 'photo.3.jpg' stands here a second time"


def _double_id(source: Karpathy) -> str:
    source.rows[5]["imgid"] = source.rows[3]["imgid"]
    return "images[5]: image id 103 stands here a second time"


def _no_field(source: Karpathy) -> str:
    del source.rows[3]["filename"]
    del source.long[3]
    return "images[3]: no field 'filename'"


def _number_as_name(source: Karpathy) -> str:
    source.rows[3]["filename"] = 12
    del source.long[3]
    return "images[3]: field 'filename' is 12, not text"


def _text_as_id(source: Karpathy) -> str:
    source.rows[3]["imgid"] = "three"
    return "images[3]: image id 'three' is not a whole number"


def _split_with_a_slash(source: Karpathy) -> str:
    source.rows[3]["split"] = "../train"
    return "images[3]: split '../train' is not a name"


SPOILS = [
    _missing_image,
    _truncated_image,
    _empty_image,
    _not_an_image,
    _folder_as_image,
    _unknown_dense,
    _double_dense,
    _missing_dense,
    _empty_dense,
    _no_dense_column,
    _empty_caption,
    _number_as_caption,
    _broken_unicode,
    _double_image,
    _double_id,
    _no_field,
    _number_as_name,
    _text_as_id,
    _split_with_a_slash,
]


@pytest.mark.parametrize("spoil", SPOILS)
def test_fault_is_one_line_and_nothing_is_written(
    spoil: Callable[[Karpathy], str], karpathy: Karpathy, tmp_path: Path, refused: Callable[..., str]
) -> None:
    expected = spoil(karpathy)
    karpathy.write()
    assert expected in refused(karpathy.arguments(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# What is left out with the fault: the image that it concerns, or only the row of the dense file.
HARMLESS = (_unknown_dense, _double_dense)


@pytest.mark.parametrize("spoil", SPOILS)
def test_quarantine_lists_the_fault_and_leaves_out_that_image_alone(
    spoil: Callable[[Karpathy], str], karpathy: Karpathy, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    expected = spoil(karpathy)
    assert karpathy.build(tmp_path / "out", "--on-error", "quarantine") == 0
    told = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert f"{len(rows)} fault" in told
    # A dense row that cannot be used leaves its image without one: two lines on one image.
    assert len(rows) == 1 or spoil is _no_dense_column
    listed = [f"{row['where']}: {row['reason']}" for row in rows]
    assert any(expected in line for line in listed), listed
    kept = {row["source_id"]: row for row in read_manifest(tmp_path / "out").to_pylist()}
    left = {f"photo.{number}.jpg" for number in range(15)} - set(kept)
    if spoil in (*HARMLESS, _double_image):
        assert left == set()
    else:
        assert left == {"photo.5.jpg" if spoil is _double_id else "photo.3.jpg"}
    for name, row in kept.items():
        number = name.split(".")[1]
        assert all(caption.endswith(f"photo {number}") for caption in row["sparse"])
        assert row["dense"] == [f"All about {name}."]
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_image_cut_short_with_something_behind_it_is_found(
    karpathy: Karpathy, tmp_path: Path, refused: object
) -> None:
    path = karpathy.images / "photo.3.jpg"
    path.write_bytes(path.read_bytes()[:-200] + b"HTTP/1.1 504 Gateway Time-out")
    karpathy.write()
    assert "photo.3.jpg: the image does not decode" in refused(karpathy.arguments(tmp_path / "out"))


def test_damage_that_only_decoding_shows_stops_the_build_at_that_shard(
    karpathy: Karpathy, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = karpathy.images / "photo.3.jpg"
    data = bytearray(picture(3, form="PNG"))
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    karpathy.write()
    assert "photo.3.jpg: the image does not decode" in refused(karpathy.arguments(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.parquet").exists()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("not json at all", "captions.json: line 1: not JSON"),
        ('{"images": [\n{"filename": }]}', "captions.json: line 2: not JSON"),
        ("[]", "this is not Karpathy's layout"),
        ('{"images": []}', "the source has no images"),
    ],
)
def test_caption_file_in_another_format(
    text: str, expected: str, karpathy: Karpathy, tmp_path: Path, refused: Callable[..., str]
) -> None:
    karpathy.write()
    karpathy.captions.write_text(text)
    assert expected in refused(karpathy.arguments(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_caption_file_that_is_no_text(
    karpathy: Karpathy, tmp_path: Path, refused: Callable[..., str]
) -> None:
    karpathy.write()
    karpathy.captions.write_bytes(b"\xff\xfe\x00\x01")
    assert "captions.json: byte 0: not UTF-8 text" in refused(karpathy.arguments(tmp_path / "out"))
    karpathy.write()
    karpathy.dense.write_bytes(b'{"filename": "photo.0.jpg", "text": "\xff"}\n')
    assert "dense.jsonl: line 1: byte 37 (0xff) is not UTF-8 text; save it as UTF-8" in refused(
        karpathy.arguments(tmp_path / "out")
    )


def test_dense_line_that_is_not_json(karpathy: Karpathy, tmp_path: Path, refused: Callable[..., str]) -> None:
    karpathy.write()
    lines = karpathy.dense.read_text().splitlines()
    karpathy.dense.write_text("\n".join([*lines[:2], "{oops", *lines[3:]]))
    assert "dense.jsonl: line 3: not JSON" in refused(karpathy.arguments(tmp_path / "out"))


def test_split_that_loses_all_its_images_is_empty(
    karpathy: Karpathy, tmp_path: Path, refused: object
) -> None:
    for row in karpathy.rows[13:]:
        (karpathy.images / row["filename"]).unlink()
    karpathy.write()
    arguments = karpathy.arguments(tmp_path / "out", "--on-error", "quarantine")
    assert "split 'test' is empty" in refused(arguments)


@pytest.mark.parametrize("decoded", [False, True])
def test_reasons_are_kept_when_nothing_is_left(
    decoded: bool, karpathy: Karpathy, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = bytearray(picture(3, form="PNG"))
    data[len(data) // 2] ^= 1
    for row in karpathy.rows[13:]:
        path = karpathy.images / row["filename"]
        path.write_bytes(data) if decoded else path.unlink()
    karpathy.write()
    arguments = karpathy.arguments(tmp_path / "out", "--on-error", "quarantine")
    assert main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    reason = "the image does not decode" if decoded else "does not exist"
    assert "split 'test' is empty" in line
    assert "left out: " in line
    assert reason in line
    assert "quarantine.jsonl" in line
    listed = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert [reason in json.loads(row)["reason"] for row in listed] == [True, True]
    if not decoded:
        for row in karpathy.rows[13:]:
            (karpathy.images / row["filename"]).write_bytes(picture(1))
        assert main(arguments) == 0
        assert not (tmp_path / "out" / "quarantine.jsonl").exists()


def test_no_row_and_no_line_repeats_a_long_value(
    karpathy: Karpathy, tmp_path: Path, refused: Callable[..., str]
) -> None:
    karpathy.rows[3]["imgid"] = "7" * 100_000
    karpathy.rows[4]["filename"] = {"bytes": "x" * 100_000}
    del karpathy.long[4]
    karpathy.write()
    assert len(refused(karpathy.arguments(tmp_path / "out"))) < 800
    assert karpathy.build(tmp_path / "out", "--on-error", "quarantine") == 0
    rows = [json.loads(row) for row in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(len(value) <= 300 for row in rows for value in row.values())
    assert all("not" in row["reason"] for row in rows)


def test_missing_options_and_files(karpathy: Karpathy, tmp_path: Path, refused: Callable[..., str]) -> None:
    karpathy.write()
    out = ["--out", str(tmp_path / "out")]
    assert "needs --captions" in refused(["build", "--source", "karpathy", *out])
    good = karpathy.arguments(tmp_path / "out")
    wrong = [str(karpathy.root / "elsewhere") if part == str(karpathy.images) else part for part in good]
    assert "elsewhere: no such folder" in refused(wrong)
    wrong = [str(karpathy.root / "none.jsonl") if part == str(karpathy.dense) else part for part in good]
    assert "none.jsonl: no such file" in refused(wrong)
    assert "quality=101" in refused([*good, "--quality", "101"])
    assert "build --out" in refused(["stats", str(karpathy.root)])
    assert "build --out" in refused(["verify", str(karpathy.root)])


@pytest.mark.parametrize("option", [("--shard-size", "0"), ("--count", "train=0"), ("--workers", "-1")])
def test_options_out_of_range_are_usage_errors(
    option: tuple[str, str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["build", "--source", "scenes", "--out", "nowhere", *option])
    assert error.value.code == 2
    assert option[0] in capsys.readouterr().err


def test_missing_dense_can_be_allowed(karpathy: Karpathy, tmp_path: Path) -> None:
    del karpathy.long[3]
    karpathy.long.append({"filename": "elsewhere.jpg", "text": "Another collection's image."})
    assert karpathy.build(tmp_path / "out", "--dense-missing", "allow", "--dense-extra", "allow") == 0
    rows = {row["source_id"]: row for row in read_manifest(tmp_path / "out").to_pylist()}
    assert [name for name, row in rows.items() if not row["dense"]] == ["photo.3.jpg"]
    assert "quarantine.jsonl" not in contents(tmp_path / "out")
