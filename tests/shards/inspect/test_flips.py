"""Hundreds of random single-byte flips: `verify` finds each, or it is proved harmless; training lives with them."""

import io
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image

from d2s.data.batch import BatchBuilder
from d2s.data.batches import TrainBatches
from d2s.data.config import DataConfig
from d2s.shards.cli import main
from d2s.shards.format.manifest import read_manifest
from d2s.shards.inspect.verify import verify
from d2s.shards.read.index import ShardIndex
from d2s.shards.read.records import DamagedSample, ShardReader
from d2s.training.run_log import read_rows

FLIPS = 400


def flip(path: Path, place: int, change: int) -> None:
    """Changes one byte of a file; done twice, it is as before."""
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ change]))


def samples(folder: Path) -> list[object]:
    """All that a reader sees: splits, and every sample decoded."""
    index = ShardIndex.open(folder)
    reader = ShardReader(index)
    return [index.splits, *(decoded(reader, row) for row in range(len(index)))]


def decoded(reader: ShardReader, row: int) -> tuple:
    """A sample as (key, image id, pixels, sparse captions, dense captions)."""
    record = reader.record(row)
    pixels = np.asarray(Image.open(io.BytesIO(record.image))).tobytes()
    return record.key, record.image_id, pixels, record.sparse, record.dense


def region(rows: list[dict], name: str, place: int) -> tuple[str, str]:
    """What lies at a place of a file, and the key of the sample whose bytes these are ("" where of none)."""
    if not name.endswith(".tar"):
        return name, ""
    for row in (row for row in rows if row["shard"] == name):
        for kind in ("image", "json"):
            if row[f"{kind}_offset"] <= place < row[f"{kind}_offset"] + row[f"{kind}_size"]:
                return f"tar: {kind}", row["key"]
    return "tar: headers, padding, end", ""


def draw(rng: np.random.Generator, files: dict[str, int]) -> tuple[str, int, int]:
    """A random byte (file, place, change): of the tars by their size, of the manifest, of the other files."""
    kind = rng.random()
    tars = [name for name in files if name.endswith(".tar")]
    if kind < 0.6:
        sizes = np.array([files[name] for name in tars])
        name = str(rng.choice(tars, p=sizes / sizes.sum()))
    elif kind < 0.85:
        name = "manifest.parquet"
    else:
        name = str(rng.choice(sorted(files.keys() - {*tars, "manifest.parquet"})))
    return name, int(rng.integers(files[name])), int(rng.integers(1, 256))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hundreds_of_flips_are_found_or_harmless(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = shutil.copytree(dataset, tmp_path / "copy")
    before, rows = samples(folder), read_manifest(folder).to_pylist()
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    rng, tally = np.random.default_rng(5), Counter()
    for _ in range(FLIPS):
        name, place, change = draw(rng, files)
        what, key = region(rows, name, place)
        flip(folder / name, place, change)
        faults = list(verify(folder))
        if faults:
            # By name, and with the sample's key where a sample's own bytes were hit. A damaged checksum is told
            # as a fault of the file that it belongs to.
            named = [fault for fault in faults if fault.file == name and (not key or fault.key == key)]
            assert named or name == "checksums.json", (name, place, change, faults)
            tally[what, "found"] += 1
        else:
            assert name == "checksums.json", f"byte {place} of {name} (^ {change}) is not found"
            assert samples(folder) == before, (name, place, change)
            tally[what, "harmless"] += 1
        flip(folder / name, place, change)
    assert list(verify(folder)) == []
    assert sum(tally.values()) == FLIPS
    # White space between the entries of checksums.json is all that may change unnoticed.
    assert sum(count for (_, how), count in tally.items() if how == "harmless") <= 10
    with capsys.disabled():
        print(f"\n{FLIPS:,} flipped bytes")
        for (what, how), count in sorted(tally.items()):
            print(f"  {what:<28}{how:<10}{count:>5}")


@pytest.mark.slow
def test_what_reads_a_damaged_set_says_so_in_one_line(dataset: Path, tmp_path: Path) -> None:
    """A flipped byte anywhere leaves a sample as it was, or gives a ValueError of one line; nothing else."""
    folder = shutil.copytree(dataset, tmp_path / "copy")
    before, rows = samples(folder)[1:], read_manifest(folder).to_pylist()
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    rng, refused = np.random.default_rng(6), 0
    for number in range(150):
        name, place, change = draw(rng, files)
        if number % 2:
            name, place = "index.arrow", int(rng.integers(files["index.arrow"]))
        key = region(rows, name, place)[1]
        flip(folder / name, place, change)
        for row, seen in enumerate(each_sample(folder)):
            if not isinstance(seen, ValueError):
                assert seen[2:] == before[row][2:]
                continue
            assert name == "index.arrow" or (key and key in str(seen)), (name, place, seen)
            assert "\n" not in str(seen)
            refused += 1
        flip(folder / name, place, change)
    assert refused


def each_sample(folder: Path) -> Iterator[tuple | ValueError]:
    """Every sample decoded, or why it cannot be; the reason alone where the whole index is refused."""
    try:
        reader = ShardReader(ShardIndex.open(folder))
    except ValueError as error:
        yield error
        return
    for row in range(len(reader.index)):
        try:
            yield decoded(reader, row)
        except DamagedSample as error:
            yield error


def spoil(folder: Path, count: int) -> set[str]:
    """Flips `count` bytes of the training tars, samples' and others; returns the keys of the samples hit."""
    rng, rows = np.random.default_rng(7), read_manifest(folder, split="train").to_pylist()
    tars = sorted({row["shard"] for row in rows})
    hit = set()
    for _ in range(count):
        name = str(rng.choice(tars))
        place = int(rng.integers((folder / name).stat().st_size))
        flip(folder / name, place, int(rng.integers(1, 256)))
        hit.add(region(rows, name, place)[1])
    return hit - {""}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """48 scenes to train on, many of them damaged, and the keys of those."""
    out = tmp_path_factory.mktemp("spoilt") / "scenes"
    assert main(f"build --source scenes --count train=48,val=8,test=8 --size 32 --out {out}".split()) == 0
    return out, spoil(out, 40)


def named(lines: str) -> set[str]:
    return set(re.findall(r"key (\S+) \(row \d+\)", lines))


@pytest.mark.dist
def test_training_over_a_damaged_set_names_every_sample(
    spoilt: tuple[Path, set[str]], tmp_path: Path
) -> None:
    folder, hit = spoilt
    assert 4 <= len(hit) <= 40
    # Every sample is asked for once in an epoch of six steps.
    arguments = [
        "scenes_small_pretrain",
        "--data",
        str(folder),
        "--run",
        str(tmp_path / "run"),
        "--max_steps",
        "6",
    ]
    arguments += "--batch_size 8 --model.width 16 --log.every 1 --optim.warmup_steps 0".split()
    arguments += "--data.loader_workers 0 --data.image_size 32 --model.image_size 32".split()
    done = forked.run("forked:train", arguments, workers=2)
    assert done.returncode == 0, done.stderr
    rows = [row for row in read_rows(tmp_path / "run") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    # Both workers left in order, and the one that speaks for them says where.
    assert done.stdout.count("done: 6 steps") == 1
    assert named(done.stdout + done.stderr) == hit


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_number_of_steps_does_not_depend_on_damage(spoilt: tuple[Path, set[str]], world: int) -> None:
    from d2s.model import build_word_tokenizer
    from d2s.preprocess.text import TextPipeline

    folder, hit = spoilt
    index, told = ShardIndex.open(folder), set()
    pipeline = TextPipeline(build_word_tokenizer(["a red circle left of a blue square"]), 64)
    config = DataConfig(image_size=32, sparse="one", loader_workers=0)
    for rank in range(world):
        builder = BatchBuilder(config, pipeline, captions="dense", seed=0)
        batches = TrainBatches(index, "train", builder, batch_size=8, rank=rank, world=world)
        assert [len(batch) for batch in batches.epoch(0)] == [8 // world] * 6
        told |= named("\n".join(batches.damaged))
    assert told == hit
