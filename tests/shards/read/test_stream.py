import io
import json
import tarfile
from itertools import islice

import pytest
from made_shards import make_shards, picture

from d2s.shards.read.stream import Stream, expand, is_pattern


def usable(_record):
    return None


def foreign_tar(path, samples):
    """As img2dataset writes them: jpg, txt, json without our fields."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path):
    return make_shards(tmp_path / "made", {"train": 18}, per_shard=3)


def test_patterns(tmp_path):
    assert expand("http://x/{00..02}.tar::/y/a.tar") == [
        "http://x/00.tar", "http://x/01.tar", "http://x/02.tar", "/y/a.tar"
    ]  # fmt: skip
    assert is_pattern("s3://bucket/a.tar")
    assert is_pattern("pipe:cat a.tar")
    assert is_pattern("a/{0..3}.tar")
    assert not is_pattern("data/f8k")
    for name in ("set{1}", "old.tar"):
        (tmp_path / name).mkdir()
        assert not is_pattern(str(tmp_path / name))
    with pytest.raises(ValueError, match="data is"):
        expand("/x/{0..2.tar")


@pytest.mark.parametrize("readers", [1, 2, 3, 6, 8])
def test_one_pass_of_all_readers_is_the_data_once(folder, readers):
    urls = expand(str(folder / "train/{00000..00005}.tar"))
    keys, per_reader = [], []
    for reader in range(readers):
        stream = Stream(urls, seed=1, reader=reader, readers=readers, buffer=4)
        found = [sample.key for _, sample in stream.one_pass(0, 0)]
        per_reader.append(len(found))
        keys += found
    assert sorted(keys) == [f"k{n:04}" for n in range(18)]
    assert min(per_reader) > 0


def test_ours_read_as_written_repeated_and_reshuffled(folder):
    urls = expand(str(folder / "train/{00000..00005}.tar"))
    taken = list(islice(Stream(urls, seed=1).samples(0, usable), 36))
    first, second = taken[:18], taken[18:]
    assert {r.image_id for _, r in first} == {r.image_id for _, r in second} == set(range(1000, 1018))
    assert [r.key for _, r in first] != [r.key for _, r in second]
    assert len({number for number, _ in taken}) == 36  # a second visit draws anew
    for _, record in first:
        assert record.image == picture(record.image_id - 1000)
        assert (len(record.sparse), len(record.dense)) == (2, 1)
    again = list(islice(Stream(urls, seed=1).samples(0, usable), 36))
    assert [(n, r.key) for n, r in again] == [(n, r.key) for n, r in taken]
    other = list(islice(Stream(urls, seed=1).samples(1, usable), 18))
    assert [r.key for _, r in other] != [r.key for _, r in first]


def test_foreign_tars_with_named_columns(tmp_path):
    fields = {"caption": "a dog", "re_caption": "A brown dog runs."}
    members = {"jpg": picture(1), "txt": b"a dog", "json": json.dumps(fields).encode()}
    foreign_tar(tmp_path / "0.tar", [("000000001", members)])
    stream = Stream([str(tmp_path / "0.tar")], seed=0, dense_columns=("re_caption",))
    _, record = next(stream.samples(0, usable))
    assert (record.sparse, record.dense) == (("a dog",), ("A brown dog runs.",))
    assert record.image_id >= 0


def test_what_cannot_be_used_is_named(tmp_path):
    good = {"jpg": picture(1), "json": b'{"caption": "a dog"}'}
    bad = [
        ("b1", {"jpg": picture(2), "json": b'{"caption": '}),
        ("b2", {"json": b'{"caption": "a cat"}'}),
        ("b3", {"jpg": picture(3), "json": b'{"caption": 7}'}),
        ("b4", {"jpg": picture(4), "json": b"{}"}),
    ]
    foreign_tar(tmp_path / "0.tar", [*bad, ("good", good)])
    (tmp_path / "1.tar").write_bytes(b"no tar" * 500)
    urls = [str(tmp_path / f"{n}.tar") for n in range(3)]
    stream = Stream(urls, seed=0)
    samples = stream.samples(0, lambda record: None if record.sparse else "has no sparse caption")
    assert {record.key for _, record in islice(samples, 3)} == {"good"}
    notes = " | ".join(stream.notes)
    for part in (
        "key b1: its captions",
        "key b2: has no image",
        "key b3: its captions",
        "key b4: has no sparse",
    ):
        assert part in notes
    assert "1.tar: not a readable tar: ReadError" in notes
    assert "2.tar: FileNotFoundError" in notes
    assert "\n" not in notes


def test_nothing_usable_ends(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"no tar" * 500)
    with pytest.raises(ValueError, match=r"no usable sample in 1 tars, the last: .*0\.tar"):
        next(Stream([str(tmp_path / "0.tar")], seed=0).samples(0, usable))
    with pytest.raises(ValueError, match="damage_budget is 2"):
        next(Stream([str(tmp_path / f"{n}.tar") for n in range(9)], seed=0, budget=2).samples(0, usable))


@pytest.mark.parametrize("text", ['{"caption": {"a dog": 1}}', '{"caption": {"1": ["a"]}}', "[" * 100_000])
def test_captions_of_another_type_are_damage_not_text(tmp_path, text):
    members = [("bad", text.encode()), ("good", b'{"caption": "a dog", "image_id": true}')]
    foreign_tar(tmp_path / "0.tar", [(key, {"jpg": picture(1), "json": data}) for key, data in members])
    stream = Stream([str(tmp_path / "0.tar")], seed=0)
    found = [record for _, record in islice(stream.samples(0, usable), 2)]
    assert [(record.key, record.sparse) for record in found] == [("good", ("a dog",))] * 2
    assert found[0].image_id > 1
    assert len(stream.notes) == 1
    assert "key bad: its captions cannot be used" in stream.notes[0]
