"""Files as people have them: each is read as it was meant, or refused in a line that names the file and a remedy."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from shard_sources import picture

from d2s.shards.cli import main
from d2s.shards.format.manifest import read_manifest


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., list[str]]:
    """The command that builds a file of rows with two photos, 1.jpg and 2.jpg."""
    for number in (1, 2):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"images/{number}.jpg").write_bytes(picture(number))

    def write(name: str, text: str | bytes, *more: str) -> list[str]:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        paths = {"--captions": path, "--images": tmp_path / "images", "--out": tmp_path / "out"}
        return ["build", "--source", "csv", *(str(part) for pair in paths.items() for part in pair), *more]

    return write


def _sparse(out: Path) -> dict[str, list[str]]:
    return {row["source_id"]: row["sparse"] for row in read_manifest(out).to_pylist()}


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", 'path,sparse\r\n1.jpg,"Hi" she says\r\n"2.jpg","a, ""b"" c"\r\n'),
        ("a.tsv", 'path\tsparse\n1.jpg\t"Hi" she says\n2.jpg\ta, "b" c'),
    ],
)
def test_quotes_of_words_stay_in_the_caption(
    name: str, text: str, arguments: Callable, tmp_path: Path
) -> None:
    assert main(arguments(name, text)) == 0
    assert _sparse(tmp_path / "out") == {"1.jpg": ['"Hi" she says'], "2.jpg": ['a, "b" c']}


def test_text_of_another_encoding_is_named_with_its_line(arguments: Callable, refused: Callable) -> None:
    line = refused(arguments("a.csv", "path,sparse\n1.jpg,a\n2.jpg,caf\xe9\n".encode("latin-1")))
    assert line.endswith("a.csv: line 3: byte 9 (0xe9) is not UTF-8 text; save it as UTF-8")


def test_file_without_captions_is_told_which_columns_there_are(
    arguments: Callable, refused: Callable
) -> None:
    line = refused(arguments("a.csv", "path,alt\n1.jpg,a\n2.jpg,b\n"))
    assert "line 2: image '1.jpg' has no caption; there are alt, path: --columns sparse=NAME" in line


def test_input_without_rows_or_samples_is_named(
    arguments: Callable, refused: Callable, tmp_path: Path
) -> None:
    assert "a.csv: no rows in it; nothing to build" in refused(arguments("a.csv", "path,sparse\n"))
    (tmp_path / "tars").mkdir()
    tarfile.open(tmp_path / "tars/0.tar", "w").close()
    assert "tars: no sample in any of its tars (1)" in refused(["index", str(tmp_path / "tars")])


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "filename,caption\n1.jpg,a\n",
            "no column 'text'; there are filename, caption: --dense-columns NAME",
        ),
        ("image,text\n1.jpg,a\n", "no column 'filename'; there are image, text: --dense-key-column NAME"),
        ("", "no column 'filename'; there are none, the file is empty"),
        ("filename,text\n3.jpg,a\n", "; an image here is '1.jpg'; --dense-extra allow skips such rows"),
    ],
)
def test_dense_captions_that_do_not_fit_name_the_option(
    text: str, expected: str, arguments: Callable, refused: Callable, tmp_path: Path
) -> None:
    (tmp_path / "dense.csv").write_text(text)
    command = arguments("a.csv", "path,sparse\n1.jpg,a\n2.jpg,b\n", "--dense", str(tmp_path / "dense.csv"))
    assert expected in refused(command)


@pytest.mark.parametrize(
    "name", ["x\\1.jpg", "images/x/1.jpg", "images\\x\\1.JPG", "x/1.JPG", "x/1", "x/1.Jpg"]
)
def test_missing_image_that_is_there_under_another_name(
    name: str, arguments: Callable, refused: Callable, tmp_path: Path
) -> None:
    command = arguments("a.csv", f"path,sparse\n{name},a\n")
    (tmp_path / "images/x").mkdir()
    (tmp_path / "images/1.jpg").rename(tmp_path / "images/x/1.jpg")
    assert refused(command).endswith(
        " does not exist; " + f"{tmp_path / 'images/x/1.jpg'} does: write its name so"
    )


def test_missing_image_is_told_what_names_are_relative_to(arguments: Callable, refused: Callable) -> None:
    assert "does not exist; names are relative to --images" in refused(
        arguments("a.csv", "path,sparse\n3.jpg,a\n")
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ('[{"path": "1.jpg", "sparse": "a"},\n]', "line 2: not JSON: a comma before the ]; delete it"),
        ('{"path": "1.jpg", "sparse": "a"},\n', "line 1: not JSON: Extra data; delete the comma at its end"),
        ('[{"path": "1.jpg", "x": ' + "9" * 5000 + "}]", "a.json: line 1: not JSON: Exceeds the limit"),
    ],
)
def test_json_with_a_comma_too_many_or_a_huge_number(
    text: str, expected: str, arguments: Callable, refused: Callable
) -> None:
    assert expected in refused(arguments("a.json", text))


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "`git lfs pull` fetches the file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC: convert it to JPEG"),
        (b'<?xml version="1.0"?>\n<svg width="4"/>', "it seems to be SVG: convert it to PNG"),
        (b"<!DOCTYPE html><html>404</html>", "it is HTML: download it again"),
    ],
)
def test_file_that_is_no_image_is_told_what_it_is(
    data: bytes, expected: str, arguments: Callable, refused: Callable, tmp_path: Path
) -> None:
    command = arguments("a.csv", "path,sparse\n1.jpg,a\n")
    (tmp_path / "images/1.jpg").write_bytes(data)
    line = refused(command)
    assert "1.jpg: the image does not decode: no known image format; " in line
    assert line.endswith(expected)


def test_pointer_of_git_lfs_is_no_parquet(arguments: Callable, refused: Callable) -> None:
    line = refused(arguments("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:ab\n"))
    assert "a.parquet: a pointer of Git LFS, not the file itself: `git lfs pull` fetches it" in line


def test_first_line_of_excel_names_the_separator(arguments: Callable, tmp_path: Path) -> None:
    assert main(arguments("a.csv", "\ufeffsep=;\r\npath; sparse\r\n1.jpg;a, b\r\n2.jpg;b\r\n")) == 0
    assert _sparse(tmp_path / "out") == {"1.jpg": ["a, b"], "2.jpg": ["b"]}


def test_lines_that_end_with_a_carriage_return_alone(arguments: Callable, refused: Callable) -> None:
    line = refused(arguments("a.csv", "path,sparse\r1.jpg,a\r"))
    assert "a.csv: line 1: not CSV: a carriage return alone ends a line here; save it with" in line


@pytest.mark.parametrize(
    "names, expected",
    [
        (["in.tar"], "in: has no image, only .tar; in.tar is a tar inside of the tar: unpack it"),
        (
            ["a.v1.0.jpg", "a.v1.0.txt", "a.v2.0.jpg"],
            "--suffixes image=v1.0.jpg says which to take (a key ends at the first dot of a name: rename",
        ),
        (["a.jpg", "a.png"], "; --suffixes image=jpg says which to take"),
    ],
)
def test_members_of_a_tar_that_make_no_sample(
    names: list[str], expected: str, refused: Callable, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert expected in refused(["index", str(tmp_path)])


@pytest.mark.parametrize(
    "text, expected",
    [
        ('[{"path": "1.jpg", "sparse": NaN}]', "row 0: caption 0 is float, not text: nan"),
        ('{"path": "1.jpg", "sparse": [["a"]]}', "line 1: caption 0 is list, not text: ['a']"),
        (
            '{"path": {"0": "1.jpg"}, "sparse": {"0": "a"}}',
            "line 1: pandas wrote columns; rows come of to_json(",
        ),
        ('{"1.jpg": ["a"], "2.JPG": ["b"]}', "line 1: maps names to captions; write rows {"),
    ],
)
def test_json_of_other_shapes(text: str, expected: str, arguments: Callable, refused: Callable) -> None:
    assert expected in refused(arguments("a.json", text))


def test_tar_in_upper_case_is_named(refused: Callable, tmp_path: Path) -> None:
    tarfile.open(tmp_path / "0.TAR", "w").close()
    assert "no .tar in it; 0.TAR: write .tar in lower case" in refused(["index", str(tmp_path)])


def test_member_that_seems_to_be_a_caption_is_offered(refused: Callable, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (("a.jpg", picture(1)), ("a.cls", b"3"), ("a.caption", b"a dog")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert "there is .cls, .caption: --suffixes caption=caption takes one" in refused(
        ["index", str(tmp_path)]
    )


def test_split_of_another_name_is_no_val(arguments: Callable, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments("a.csv", "path,sparse,split\n1.jpg,a,Train\n2.jpg,b,validation\n")) == 0
    told = capsys.readouterr().out
    assert "no split 'train': nothing to train on; 'Train' is another: write 'train' in the source" in told
    assert "best checkpoint; 'validation' is another: write 'val' in the source" in told
