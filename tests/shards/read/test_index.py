import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_shards import make_shards, write_index

from d2s.shards.bench import main as bench
from d2s.shards.format import index_file
from d2s.shards.format.manifest import read_manifest
from d2s.shards.read import index as index_module
from d2s.shards.read.index import ShardIndex
from d2s.shards.read.records import DamagedSample, ShardReader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shards(
        tmp_path_factory.mktemp("made"), {"train": 11, "val": 5}, n_sparse=[2, 0, 3], n_dense=[1, 2]
    )


def test_rows_totals_and_shards(folder):
    index = ShardIndex.open(folder)
    assert (len(index), index.rows("train"), index.rows("val")) == (16, range(0, 11), range(11, 16))
    counts = [[2, 0, 3][i % 3] for i in range(16)]
    assert index.n_sparse_total("train") == sum(counts[:11])
    assert index.n_sparse_total("val") == sum(counts[11:])
    assert index.total("val", "dense") == sum([1, 2][i % 2] for i in range(11, 16))
    assert index.shard_sizes("train").tolist() == [4, 4, 3]
    assert index.shard_sizes("val").tolist() == [4, 1]
    assert index.shard_sizes("train", "sparse").tolist() == [
        sum(counts[:4]), sum(counts[4:8]), sum(counts[8:11])
    ]  # fmt: skip
    assert index.without("train", "sparse") == (4, 1)
    assert index.without("val", "dense") == (0, -1)
    assert index.keys([0, 4, 15]) == ["k0000", "k0004", "k0015"]
    assert index.location(12).shard == "val/00000.tar"


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_pairs_number_every_caption_once(folder, split, kind):
    index = ShardIndex.open(folder)
    wanted = [(row, j) for row in index.rows(split) for j in range(index.column(f"n_{kind}")[row])]
    rows, numbers = index.pair(split, np.arange(index.total(split, kind)), kind)
    assert list(zip(rows.tolist(), numbers.tolist(), strict=True)) == wanted


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=300), skew=st.integers(0, 5000))
@settings(max_examples=60)
def test_pairs_with_any_counts(tmp_path_factory, counts, skew):
    counts = [*counts, skew]
    if sum(counts) == 0:
        return
    folder = tmp_path_factory.mktemp("counts")
    n = len(counts)
    columns = {name: np.zeros(n, np.int64) for name in index_file.index_schema([], {}).names}
    columns["n_sparse"] = np.array(counts)
    columns["sparse_start"] = np.cumsum(counts) - counts
    form = index_file.index_schema(["train/00000.tar"], {"train": [0, n]})
    batch = pa.record_batch(
        [pa.array(columns[f.name].astype(f.type.to_pandas_dtype())) for f in form], schema=form
    )
    with pa.OSFile(str(folder / "index.arrow"), "wb") as file, pa.ipc.new_file(file, form) as writer:
        writer.write_batch(batch)
    rows, numbers = ShardIndex(folder).pair("train", np.arange(sum(counts)))
    assert (rows == np.repeat(np.arange(n), counts)).all()
    assert (numbers == np.concatenate([np.arange(c) for c in counts])).all()


def test_columns_are_views_of_the_file(folder):
    index = ShardIndex.open(folder)
    for name in index_file.index_schema([], {}).names:
        assert not index.column(name).flags.owndata
        assert not index.column(name).flags.writeable


def test_pickled_and_let_go_of(folder):
    index = pickle.loads(pickle.dumps(ShardIndex.open(folder)))
    before = index.take("image_offset", np.arange(16)).copy()
    for _ in range(600):  # passes the mark at which the pages are given back
        assert (index.take("image_offset", np.arange(16)) == before).all()


def test_opening_brings_no_torch(folder):
    code = f"import sys; from d2s.shards.read.index import ShardIndex as S; S.open({str(folder)!r})"
    code += "; import d2s.shards.read.records, d2s.shards.order.permutation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("missing", ["", "index.arrow", "manifest.parquet"])
def test_no_data_set(folder, tmp_path, missing):
    for name in ("index.arrow", "manifest.parquet"):
        if missing and name != missing:
            os.link(folder / name, tmp_path / name)
    with pytest.raises(ValueError, match=r"python -m d2s\.shard") as error:
        ShardIndex.open(tmp_path if missing else tmp_path / "nothing")
    assert "\n" not in str(error.value)


def test_damaged_index_and_unknown_split(folder, tmp_path):
    os.link(folder / "manifest.parquet", tmp_path / "manifest.parquet")
    (tmp_path / "index.arrow").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match="is not an Arrow file"):
        ShardIndex.open(tmp_path)
    (tmp_path / "index.arrow").write_bytes(b"")
    with pytest.raises(ValueError, match="is not an Arrow file"):
        ShardIndex.open(tmp_path)
    with pytest.raises(ValueError, match=r"split 'test' .* has no image: .* train \(11\), val \(5\)"):
        ShardIndex.open(folder).rows("test")


def test_fingerprint_tells_data_sets_apart(folder, tmp_path):
    other = make_shards(tmp_path, {"train": 12})
    assert ShardIndex.open(folder).fingerprint() == ShardIndex.open(folder).fingerprint()
    assert ShardIndex.open(folder).fingerprint() != ShardIndex.open(other).fingerprint()


def test_bench_measures_a_fresh_process(capsys, tmp_path):
    assert bench(["--rows", "50000", "--batches", "20", "--dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "index of 50,000 rows" in printed
    assert "opened in a fresh process in 0." in printed
    assert json.dumps(list(tmp_path.iterdir())) == "[]"


@pytest.mark.parametrize("sized_rows", [100, 3])
def test_missing_or_short_shard_is_noticed_when_opening(tmp_path, monkeypatch, sized_rows):
    monkeypatch.setattr(index_module, "_SIZED_ROWS", sized_rows)
    folder = make_shards(tmp_path, {"train": 9, "val": 4})
    ShardIndex.open(folder)
    place = ShardIndex.open(folder).location(7)
    os.truncate(folder / "train/00001.tar", place.json_offset + place.json_size)
    ShardIndex.open(folder)
    os.truncate(folder / "train/00001.tar", place.json_offset + place.json_size - 1)
    if sized_rows > 13:  # of larger data sets only the presence of the shards is looked at
        with pytest.raises(ValueError, match=r"train/00001.tar: cut short: .* copy it here again") as error:
            ShardIndex.open(folder)
        assert "\n" not in str(error.value)
    (folder / "val/00000.tar").unlink()
    (folder / "train/00001.tar").write_bytes(bytes(20_000))
    with pytest.raises(ValueError, match=r"val/00000.tar: no such file, but the index names it"):
        ShardIndex.open(folder)


def test_missing_or_short_sidecar_is_noticed(tmp_path):
    folder = make_shards(tmp_path / "made", {"train": 3})
    table = read_manifest(folder)
    write_index(folder, table, np.zeros(3, np.uint32), "sidecar")
    end = max(
        ShardIndex(folder).location(row).json_offset + ShardIndex(folder).location(row).json_size
        for row in range(3)
    )
    with pytest.raises(ValueError, match=r"captions.jsonl: no such file"):
        ShardIndex.open(folder)
    (folder / "captions.jsonl").write_bytes(bytes(end - 1))
    with pytest.raises(ValueError, match=r"captions.jsonl: cut short"):
        ShardIndex.open(folder)
    (folder / "captions.jsonl").write_bytes(bytes(end))
    ShardIndex.open(folder)


def test_flipped_bits_are_a_value_error(tmp_path):
    folder = make_shards(tmp_path, {"train": 11, "val": 5}, n_sparse=[2, 0, 3], n_dense=[1, 2])
    whole, rng = (folder / "index.arrow").read_bytes(), np.random.default_rng(0)
    refused = lines = 0
    for bit in rng.integers(0, len(whole) * 8, 400).tolist():
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        # A new file each time: the old one may still be mapped.
        (folder / "index.arrow").unlink()
        (folder / "index.arrow").write_bytes(data)
        try:
            index = ShardIndex.open(folder)
            reader = ShardReader(index)
            for split, kind in itertools.product(("train", "val"), ("sparse", "dense")):
                rows, numbers = index.pair(split, np.arange(min(index.total(split, kind), 100)), kind)
                for row, number in zip(rows.tolist(), numbers.tolist(), strict=True):
                    assert getattr(reader.record(row), kind)[number]
        except ValueError as error:
            refused, lines = refused + 1, lines + str(error).count("\n")
    assert not lines
    assert refused > 100


def test_row_in_a_shard_that_is_not_there(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    batch = pa.ipc.open_file(str(folder / "index.arrow")).get_batch(0)
    shards = batch.column("shard").to_numpy().copy()
    shards[9] = 77
    batch = batch.set_column(0, batch.schema.field(0), pa.array(shards))
    with (
        pa.OSFile(str(tmp_path / "index.arrow"), "wb") as file,
        pa.ipc.new_file(file, batch.schema) as writer,
    ):
        writer.write_batch(batch)
    with pytest.raises(ValueError, match="row 9 is in shard 77 of 5"):
        ShardIndex.open(tmp_path)
    with pytest.raises(DamagedSample, match="row 9: is in shard 77 of 5"):
        ShardReader(ShardIndex(tmp_path)).record(9)
