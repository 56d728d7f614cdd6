import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from made_shards import captions, make_shards, picture

from d2s.shards.read.index import ShardIndex
from d2s.shards.read.records import DamagedSample, ShardReader


@pytest.fixture
def folder(tmp_path):
    return make_shards(tmp_path / "made", {"train": 10, "val": 3}, n_sparse=[2, 3], n_dense=[0, 1])


def flip(folder, row, member="image"):
    place = ShardIndex.open(folder).location(row)
    offset = (place.image_offset if member == "image" else place.json_offset) + 20
    with open(folder / place.shard, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def test_every_record_as_written(folder):
    reader = ShardReader(ShardIndex.open(folder), max_open=1)
    for row in [12, 0, 5, 9, 3, 1]:
        record = reader.record(row)
        short, long = captions(row, [2, 3][row % 2], [0, 1][row % 2])
        assert (record.row, record.key, record.image_id) == (row, f"k{row:04}", 1000 + row)
        assert record.image == picture(row)
        assert (list(record.sparse), list(record.dense)) == (short, long)
        assert reader.captions(row) == (record.key, record.sparse, record.dense)


@pytest.mark.parametrize("member", ["image", "json"])
def test_one_flipped_bit_is_named(folder, member):
    flip(folder, 6, member)
    reader = ShardReader(ShardIndex.open(folder))
    with pytest.raises(DamagedSample, match=r"train/00001.tar: key k0006 \(row 6\): crc32 is") as error:
        reader.record(6)
    assert "\n" not in str(error.value)
    assert reader.record(5).key == "k0005"
    assert reader.record(7).key == "k0007"
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value)


def test_without_the_checksum_only_gross_damage_shows(folder):
    flip(folder, 6)
    assert ShardReader(ShardIndex.open(folder), verify=False).record(6).image != picture(6)


def test_short_and_missing_shards_are_named(folder):
    reader = ShardReader(ShardIndex.open(folder))
    os.truncate(folder / "train/00000.tar", 3000)
    (folder / "train/00002.tar").unlink()
    assert reader.record(0).key == "k0000"
    with pytest.raises(DamagedSample, match=r"00000.tar: key k0003 .* the file ends before"):
        reader.record(3)
    with pytest.raises(DamagedSample, match=r"00002.tar: key k0009 .* cannot be read: No such file"):
        reader.record(9)
    (folder / "manifest.parquet").write_bytes(b"")
    with pytest.raises(DamagedSample, match=r"00000.tar: row 3: "):
        reader.record(3)


def test_caption_counts_must_be_the_index_s(folder, tmp_path):
    other = make_shards(tmp_path / "other", {"train": 10, "val": 3}, n_sparse=[3, 2], n_dense=[0, 1])
    (folder / "index.arrow").write_bytes((other / "index.arrow").read_bytes())
    with pytest.raises(DamagedSample):
        ShardReader(ShardIndex.open(folder), verify=False).record(0)


def test_files_stay_bounded(folder):
    reader = ShardReader(ShardIndex.open(folder), max_open=2)
    before = len(os.listdir("/proc/self/fd"))
    for row in range(13):
        reader.record(row)
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert reader.record(4).key == "k0004"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reads_in_other_processes(folder, method):
    reader = ShardReader(ShardIndex.open(folder))
    reader.record(0)
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
        found = list(pool.map(reader.record, range(4), timeout=60))
    assert [record.key for record in found] == ["k0000", "k0001", "k0002", "k0003"]
