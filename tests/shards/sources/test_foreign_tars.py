"""Tars as others make them: what is no sample is skipped, what cannot be used is named, what is whole is built."""

import bz2
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest
import webdataset
from PIL import Image
from shard_sources import picture

from d2s.shards.cli import main
from d2s.shards.format.image_file import check_image
from d2s.shards.format.manifest import read_manifest
from d2s.shards.format.tar import read_members
from d2s.shards.format.tar_samples import group
from d2s.shards.read.stream import Stream

Members = list[tuple[str, bytes]]


def tar_of(members: Members) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def sample(number: int) -> Members:
    return [(f"{number}.jpg", picture(number)), (f"{number}.txt", f"about {number}".encode())]


def samples(count: int) -> Members:
    return [member for number in range(count) for member in sample(number)]


class Case:
    """A folder `tars` and the commands over it."""

    def __init__(self, root: Path) -> None:
        self.root, self.tars, self.out = root, root / "tars", root / "out"
        self.tars.mkdir()

    def beside(self, name: str) -> "Case":
        (self.root / name).mkdir()
        return Case(self.root / name)

    def put(self, data: bytes, name: str = "0.tar") -> Path:
        (self.tars / name).write_bytes(data)
        return self.tars / name

    def arguments(self, *more: str) -> list[str]:
        paths = ["--images", str(self.tars), "--out", str(self.out)]
        return ["build", "--source", "img2dataset", *paths, *more]

    def build(self, *more: str) -> dict[str, dict]:
        assert main(self.arguments(*more)) == 0
        return {row["source_id"]: row for row in read_manifest(self.out).to_pylist()}

    def quarantined(self) -> list[str]:
        lines = (self.out / "quarantine.jsonl").read_text().splitlines()
        return [f"{row['where']}: {row['reason']}" for row in map(json.loads, lines)]

    def stream(self, data: bytes) -> tuple[set[str], list[str]]:
        """Keys of the samples that a stream finds in one tar, and its notes."""
        stream = Stream([str(self.put(data))], seed=0)
        taken = islice(stream.samples(0, lambda record: None), 6)
        return {record.key for _, record in taken}, stream.notes


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


NO_SAMPLES = [
    ("README.md", b"x"),
    ("LICENSE", b"x"),
    ("license.txt", b"x"),
    ("__meta__.json", b"{}"),
    ("__info__/a.txt", b"x"),
    ("./._0.jpg", b"x"),
    ("a/b/._0.jpg", b"x"),
    ("__MACOSX/0.txt", b"x"),
    (".DS_Store", b"x"),
]


def test_what_is_no_sample_is_skipped_by_indexer_and_stream(case: Case) -> None:
    data = tar_of([*NO_SAMPLES, *sample(0), *NO_SAMPLES[:2], *sample(1)])
    assert case.stream(data) == ({"0", "1"}, [])
    case.put(data, "._0.tar")
    found = case.build()
    assert {name: row["sparse"] for name, row in found.items()} == {
        "0/0.jpg": ["about 0"],
        "0/1.jpg": ["about 1"],
    }


def test_samples_are_those_that_webdataset_finds(case: Case) -> None:
    names = [
        "0.jpg",
        "0.TXT",
        "a/0.jpg",
        "a/0.txt",
        "./b.c/1.x.jpg",
        "./b.c/1.json",
        "LICENSE",
        "2.a.b",
        "./.h.jpg",
    ]
    path = case.put(tar_of([(name, name.encode()) for name in names]))
    theirs = webdataset.tariterators.tarfile_samples([{"url": str(path)}])
    expected = [{name: data for name, data in found.items() if name != "__url__"} for found in theirs]
    with open(path, "rb") as file:
        ours = [{"__key__": found.key, **found.members} for found in group(read_members(file))]
    assert ours == expected
    assert len(ours) == 4


def apart() -> Members:
    return [member for kind in (0, 1) for number in (0, 1) for member in [sample(number)[kind]]]


FAULTY = {
    "two images": (
        [*sample(0), ("0.png", picture(0, form="PNG"))],
        "0.tar: 0: has 2 images (.jpg, .txt, .png)",
    ),
    "no image": ([("0.input.jpg", picture(0)), ("0.output.txt", b"a")], "only .input.jpg, .output.txt"),
    "apart": (apart(), "its members do not stand together"),
    "twice": ([*sample(0), *sample(0)], "member '0.jpg' stands there twice"),
    "not UTF-8": ([sample(0)[0], ("0.txt", b"\xff")], "byte 0 of its .txt is not UTF-8 text"),
    "JSON not UTF-8": ([sample(0)[0], ("0.json", b'{"caption": "\xff"}')], "is not UTF-8 text"),
    "JSON alone": (
        [sample(0)[0], ("0.json", b'{"url": "u", "text": "a dog"}')],
        "the JSON has url, text",
    ),
}


@pytest.mark.parametrize("name", FAULTY)
def test_indexer_and_stream_name_the_same_fault(name: str, case: Case, refused: Callable[..., str]) -> None:
    members, expected = FAULTY[name]
    keys, notes = case.stream(tar_of([*members, *sample(7)]))
    assert "7" in keys
    assert any(expected.removeprefix("0.tar: 0: ") in note for note in notes), notes
    expected = expected.replace("the JSON", "its JSON")
    assert expected in refused(case.arguments())
    assert list(case.build("--on-error", "quarantine")) == ["0/7.jpg"]
    assert any(expected in line for line in case.quarantined())


def test_the_remedies_that_are_named_are_right(case: Case, refused: Callable[..., str]) -> None:
    case.put(tar_of(FAULTY["no image"][0]))
    assert "--suffixes image=input.jpg,caption=output.txt " in refused(case.arguments())
    assert case.build("--suffixes", "image=input.jpg,caption=output.txt")["0/0.input.jpg"]["sparse"] == ["a"]
    case = case.beside("2")
    case.put(tar_of(FAULTY["JSON alone"][0]))
    assert "--columns sparse=text " in refused(case.arguments())
    assert case.build("--columns", "sparse=text")["0/0.jpg"]["sparse"] == ["a dog"]
    case = case.beside("two fields")
    facts = {"caption": "none of it", "alt": "a dog", "short": ["a", "b"], "long": "All about a dog."}
    case.put(tar_of([*sample(0), ("0.json", json.dumps(facts).encode())]))
    assert "no field 'none' in the JSON" in refused(case.arguments("--columns", "sparse=none"))
    row = case.build("--columns", "sparse=alt,dense=long")["0/0.jpg"]
    assert (row["sparse"], row["dense"]) == (["a dog"], ["All about a dog."])
    case = case.beside("3")
    case.put(tar_of([sample(0)[0], ("0.cap", b"a cat")]))
    assert "--suffixes caption=cap " in refused(case.arguments())
    assert main(["index", str(case.tars), "--suffixes", "caption=cap"]) == 0
    assert read_manifest(case.tars).to_pylist()[0]["sparse"] == ["a cat"]
    assert "--suffixes: 'picture' is none of" in refused(case.arguments("--suffixes", "picture=jpg"))
    assert "--columns: 'path' is none of" in refused(case.arguments("--columns", "path=jpg"))


def _cut(behind: str, more: int) -> bytes:
    data = tar_of(samples(3))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        info = tar.getmember(behind)
    return data[: info.offset_data + -(-info.size // 512) * 512 + more]


def _spoilt_header() -> bytes:
    data = bytearray(_cut("1.txt", 0) + tar_of(sample(2)))
    data[len(_cut("1.txt", 0)) + 2] ^= 1
    return bytes(data)


CUT = {
    "behind a sample": (
        _cut("1.txt", 0),
        {"0", "1"},
        "cut short: no end of the archive behind member '1.txt'",
    ),
    "behind an image": (
        _cut("2.jpg", 0),
        {"0", "1"},
        "cut short: no end of the archive behind member '2.jpg'",
    ),
    "in a header": (_cut("1.txt", 100), {"0", "1"}, "cut short"),
    "in an image": (_cut("1.txt", 600), {"0", "1"}, "cut short"),
    "in a text": (_cut("2.txt", -510), {"0", "1"}, "cut short"),
    "joined": (tar_of(samples(2)) + tar_of(sample(2)), {"0", "1"}, "of several joined by cat"),
    "spoilt header": (_spoilt_header(), {"0", "1"}, "damaged: no header of a member behind member '1.txt'"),
}


@pytest.mark.parametrize("name", CUT)
def test_a_cut_tar_is_named_and_what_is_whole_in_it_is_built(
    name: str, case: Case, refused: Callable[..., str]
) -> None:
    data, whole, expected = CUT[name]
    keys, notes = case.stream(data)
    assert keys == whole
    assert any("0.tar" in note and expected in note for note in notes), notes
    line = refused(case.arguments())
    assert "0.tar: " in line
    assert expected in line
    assert not case.out.exists()
    found = case.build("--on-error", "quarantine")
    assert {row["key"] for row in found.values()} == whole
    assert any(f"0.tar: {expected}" in line for line in case.quarantined())


def test_containers_that_cannot_be_read_are_left_out_whole(case: Case, refused: Callable[..., str]) -> None:
    case.put(tar_of(sample(0)))
    case.put(b"", "1.tar")
    case.put(b"<html>404</html>" * 100, "2.tar")
    case.put(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "3.tar")
    (case.tars / "4.tar").symlink_to(case.root / "nowhere")
    assert "1.tar: not a readable tar: ReadError: empty file" in refused(case.arguments())
    assert list(case.build("--on-error", "quarantine")) == ["0/0.jpg"]
    listed = case.quarantined()
    assert len(listed) == 4
    for line, part in zip(
        listed, ("empty file", "not a readable tar", "git lfs pull", "No such file"), strict=True
    ):
        assert part in line


def test_a_hard_link_costs_its_sample_alone(case: Case, refused: Callable[..., str]) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in [*sample(0), ("1.jpg", None), sample(1)[1], *sample(2)]:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.LNKTYPE, "0.jpg"
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data or b""))
    case.put(file.getvalue())
    assert "0.tar: 1: member '1.jpg' is a link" in refused(case.arguments())
    assert sorted(case.build("--on-error", "quarantine")) == ["0/0.jpg", "0/2.jpg"]
    assert len(case.quarantined()) == 1


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "AVIF", "PPM"])
def test_other_images_become_jpeg_as_from_a_folder(
    form: str, case: Case, refused: Callable[..., str]
) -> None:
    data = picture(1, form=form)
    suffix = {"TIFF": "tif"}.get(form, form.lower())
    case.put(tar_of([(f"1.{suffix}", data), ("1.txt", b"a")]))
    row = case.build()[f"1.{suffix}".join(("0/", ""))]
    stored = (case.out / row["shard"]).read_bytes()[row["image_offset"] :][: row["image_size"]]
    assert stored == check_image(data).data
    assert Image.open(io.BytesIO(stored)).format == "JPEG"
    assert f"format {form} is none of JPEG, PNG, WebP; `build` copies it" in refused(
        ["index", str(case.tars)]
    )


PACKED = {
    "0.tar.gz": gzip.compress,
    "0.tgz": gzip.compress,
    "0.tar.bz2": bz2.compress,
    "0.tar.zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    "0.tar": gzip.compress,
}


@pytest.mark.parametrize("name", PACKED)
def test_a_compressed_tar_gives_the_same_shards(name: str, case: Case, refused: Callable[..., str]) -> None:
    data = tar_of(samples(3))
    plain = case.put(data)
    case.build()
    expected = (case.out / "train/00000.tar").read_bytes()
    plain.unlink()
    packed = case.put(PACKED[name](data), name)
    case.out = case.root / "packed"
    case.build("--workers", "2")
    assert (case.out / "train/00000.tar").read_bytes() == expected
    assert not (case.out / ".build").exists()
    assert "is compressed (" in refused(["index", str(case.tars)])
    case.out = case.root / "cut"
    packed.write_bytes(packed.read_bytes()[:-900])
    assert f"{name}: its " in (line := refused(case.arguments()))
    assert "data is cut short or damaged" in line


def test_a_codec_error_in_a_stream_names_the_tar(case: Case) -> None:
    data = gzip.compress(tar_of(samples(40)))
    keys, notes = case.stream(data[: len(data) // 2])
    assert keys
    assert any("0.tar: cut short or damaged" in note for note in notes), notes
