import pickle
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from made_shards import captions, make_shards, picture
from tokenizer_made import wordpiece

from d2s.data.batch import BatchBuilder, random_sentences
from d2s.data.batches import TrainBatches
from d2s.data.config import DataConfig
from d2s.data.eval_batches import eval_images, eval_texts
from d2s.data.stream import StreamBatches
from d2s.preprocess.images import CROP_DRAWS, eval_image, train_image
from d2s.preprocess.text import TextPipeline
from d2s.shards.order import draws
from d2s.shards.order.permutation import Permutation
from d2s.shards.read.index import ShardIndex

PIPELINE = TextPipeline(wordpiece(), 64)
N_SPARSE, N_DENSE = [2, 3, 1], [1, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shards(
        tmp_path_factory.mktemp("made"), {"train": 21, "val": 7}, n_sparse=N_SPARSE, n_dense=N_DENSE
    )


@pytest.fixture
def index(folder):
    return ShardIndex.open(folder)


def config(**fields):
    return DataConfig(**({"image_size": 16, "loader_workers": 0} | fields))


def builder(captions="both", seed=0, dense_text=True, **fields):
    return BatchBuilder(config(**fields), PIPELINE, captions=captions, seed=seed, dense_text=dense_text)


def batches(index, captions="both", batch_size=8, fields=None, seed=3, dense_text=True, **options):
    settings = builder(captions, seed, dense_text, **(fields or {}))
    return TrainBatches(index, "train", settings, batch_size=batch_size, **options)


def same(a, b):
    for name, value in vars(a).items():
        other = getattr(b, name)
        equal = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        if not equal:
            return False
    return True


def test_an_epoch_of_pairs_holds_each_pair_once(index):
    made = batches(index, batch_size=6)
    n = index.n_sparse_total("train")
    assert (made.steps_per_epoch, len(list(made.epoch(0)))) == (n // 6, n // 6)
    order = Permutation(n, 3, 1)(np.arange(n // 6 * 6))
    rows, numbers = index.pair("train", order)
    clean = batches(index, batch_size=6, fields={"word_augment": 0.0})
    found = list(clean.epoch(1))
    assert torch.cat([batch.samples for batch in found]).tolist() == rows.tolist()
    texts = [captions(row, N_SPARSE[row % 3])[0][j] for row, j in zip(rows, numbers, strict=True)]
    for step, batch in enumerate(found):
        ids, mask = PIPELINE.encode(texts[step * 6 : step * 6 + 6])
        assert torch.equal(batch.text_ids, ids)
        assert torch.equal(batch.text_mask, mask)
        assert batch.image_ids.tolist() == [1000 + row for row in batch.samples.tolist()]


def test_a_batch_is_the_documented_function(index):
    batch = next(batches(index).epoch(2, start_step=1))
    items = Permutation(index.n_sparse_total("train"), 3, 2)(np.arange(8, 16))
    crops = draws.uniform(3, 2, items, "crop", CROP_DRAWS)
    for i, row in enumerate(batch.samples.tolist()):
        assert (batch.images[i].numpy() == train_image(picture(row), 16, crops[i])).all()
    assert (
        batch.draw_seeds.numpy().view(np.uint64).tolist() == draws.bits(3, 2, items, "tokens")[:, 0].tolist()
    )
    texts = []
    for row, number in zip(batch.samples.tolist(), batch.dense_index.tolist(), strict=True):
        texts.append(
            captions(row, N_SPARSE[row % 3], N_DENSE[row % 2])[1][number - index.column("dense_start")[row]]
        )
    assert torch.equal(batch.dense_ids, PIPELINE.encode(texts, 256)[0])


@pytest.mark.parametrize("order", ["rows", "blocks"])
@pytest.mark.parametrize("captions", ["both", "dense"])
def test_batches_do_not_depend_on_loader_processes(index, order, captions):
    fields = {"order": order, "block_shards": 2, "sparse": "one", "dense": "sentences"}
    wanted = [list(batches(index, captions, 4, fields).epoch(epoch)) for epoch in (0, 1)]
    for processes in (1, 2):
        made = batches(index, captions, 4, fields | {"loader_workers": processes})
        for epoch in (0, 1):
            found = list(made.epoch(epoch))
            assert len(found) == len(wanted[epoch]) == 5
            assert all(same(a, b) for a, b in zip(found, wanted[epoch], strict=True))
    assert not same(wanted[0][0], wanted[1][0])


@pytest.mark.parametrize("world", [2, 4])
def test_workers_share_the_global_batch(index, world):
    whole = list(batches(index).epoch(0))
    parts = [list(batches(index, rank=rank, world=world).epoch(0)) for rank in range(world)]
    assert {len(part) for part in parts} == {len(whole)}
    for step, batch in enumerate(whole):
        mine = [part[step] for part in parts]
        for name in ("images", "samples", "image_ids", "dense_index", "draw_seeds"):
            assert torch.equal(torch.cat([getattr(b, name) for b in mine]), getattr(batch, name))
        rows = [row[m].tolist() for b in mine for row, m in zip(b.text_ids, b.text_mask, strict=True)]
        assert rows == [row[m].tolist() for row, m in zip(batch.text_ids, batch.text_mask, strict=True)]


@pytest.mark.parametrize("processes", [0, 2])
def test_stopped_anywhere_and_resumed(index, processes):
    wanted = list(batches(index, batch_size=4).epoch(0))
    made = batches(index, batch_size=4, fields={"loader_workers": processes})
    for stop in (1, 4):
        head = list(islice(made.epoch(0), stop))
        tail = list(made.epoch(0, start_step=stop))  # the same object: the abandoned run must not leak in
        assert len(head) + len(tail) == len(wanted)
        assert all(same(a, b) for a, b in zip(head + tail, wanted, strict=True))
    assert list(made.epoch(0, start_step=len(wanted))) == []


def test_one_caption_a_visit(index):
    made = batches(index, "sparse", 7, {"sparse": "one"})
    assert made.steps_per_epoch == 3
    found = list(made.epoch(0))
    assert sorted(torch.cat([b.samples for b in found]).tolist()) == list(range(21))
    assert all(b.dense_ids is None and (b.dense_index == -1).all() for b in found)
    stored = batches(index, "both", 7, {"sparse": "one"}, dense_text=False)
    batch = next(stored.epoch(0))
    assert batch.dense_ids is None
    assert (batch.dense_index >= 0).all()


def test_every_caption_gets_its_turn(index):
    made = batches(index, "dense", 7)
    seen = {number for epoch in range(25) for b in made.epoch(epoch) for number in b.dense_index.tolist()}
    assert seen == set(range(index.total("train", "dense")))


def test_random_sentences_keeps_order_and_at_least_one():
    text = "One a. Two b! Three c? Four d."
    parts = ["One a.", "Two b!", "Three c?", "Four d."]
    made = {random_sentences(text, 0, 0, item) for item in range(400)}
    for variant in made:
        kept = [part for part in parts if part in variant]
        assert " ".join(kept) == variant
        assert kept
    assert len(made) == 15  # all non-empty subsets
    assert random_sentences("just one", 0, 0, 0) == "just one"


def damage(folder, row):
    place = ShardIndex.open(folder).location(row)
    with open(folder / place.shard, "r+b") as file:
        file.seek(place.image_offset + 30)
        file.write(b"\0\0\0\0")


HELD = """
import sys
from d2s.data.loader import StepLoader
from torch.utils.data import DataLoader, Dataset

class Numbers(Dataset):
    def __getitem__(self, i):
        return i

loader = StepLoader(Numbers(), 2)
sys.held = loader.run(range(100))
print(next(sys.held), flush=True)
"""


@pytest.mark.slow
def test_an_iterator_that_is_held_to_the_end_does_not_hold_the_end():
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_damage_is_replaced_named_counted_and_bounded(tmp_path):
    folder = make_shards(tmp_path / "made", {"train": 21})
    index = ShardIndex.open(folder)
    clean = list(batches(index, batch_size=6).epoch(0))
    for row in (4, 11):
        damage(folder, row)
    runs = []
    for processes in (0, 2):
        made = batches(index, batch_size=6, fields={"loader_workers": processes})
        runs.append(list(made.epoch(0)))
        list(made.epoch(1))
        assert sorted(line.split(": crc32")[0] for line in made.damaged) == [
            "train/00001.tar: key k0004 (row 4)", "train/00002.tar: key k0011 (row 11)"
        ]  # fmt: skip
    assert len(runs[0]) == len(clean)
    assert all(same(a, b) for a, b in zip(*runs, strict=True))
    for before, after in zip(clean, runs[0], strict=True):
        touched = torch.isin(before.samples, torch.tensor([4, 11]))
        assert torch.equal(before.samples[~touched], after.samples[~touched])
        assert torch.equal(before.images[~touched], after.images[~touched])
        assert not torch.isin(after.samples, torch.tensor([4, 11])).any()
        assert bool(touched.any()) == bool(after.damaged)
    with pytest.raises(ValueError, match=r"damage_budget is 1 but 2 samples are damaged, .*key k00") as error:
        list(batches(index, batch_size=6, fields={"damage_budget": 1}).epoch(0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("processes", [0, 2])
def test_nothing_readable_is_one_line(tmp_path, processes):
    folder = make_shards(tmp_path / "made", {"train": 8})
    index = ShardIndex.open(folder)
    for tar in (folder / "train").iterdir():
        tar.unlink()
    made = batches(index, fields={"loader_workers": processes})
    with pytest.raises(ValueError, match="samples one after the other are damaged") as error:
        list(made.epoch(0))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot be read") as error:
        list(eval_images(index, "train", config(loader_workers=processes), 4))
    assert "\n" not in str(error.value)


def test_an_image_that_cannot_be_decoded_is_damage(tmp_path):
    folder = make_shards(tmp_path / "made", {"train": 8})
    damage(folder, 2)
    index = ShardIndex.open(folder)
    made = batches(index, fields={"image_size": 16})
    made._loader._dataset.dataset.reader.verify = False
    found = list(made.epoch(0))
    assert len(found) == 2
    assert all("k0002" in line for line in made.damaged)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [2, 3, 50])
def test_evaluation_shows_everything_once_in_equal_steps(index, world, batch_size):
    images, texts = {}, {"sparse": [], "dense": []}
    steps = set()
    for rank in range(world):
        made = list(eval_images(index, "val", config(), batch_size, rank, world))
        steps.add(("images", len(made)))
        for rows, pixels, valid in made:
            assert len(rows) == len(pixels) == len(valid) == batch_size
            assert (rows[~valid] == -1).all()
            for row, image in zip(rows[valid].tolist(), pixels[valid], strict=True):
                assert row not in images
                images[row] = image
        for kind, found in texts.items():
            made = list(eval_texts(index, "val", PIPELINE, kind, batch_size, rank, world))
            steps.add((kind, len(made)))
            for numbers, rows, ids, mask, valid in made:
                assert mask.any(1).all()
                for values in zip(
                    numbers[valid].tolist(), rows[valid].tolist(), ids[valid], mask[valid], strict=True
                ):
                    found.append(values)
    assert len(steps) == 3  # one number of steps for each kind, on all workers
    assert sorted(images) == list(range(21, 28))
    assert all((image.numpy() == eval_image(picture(row), 16)).all() for row, image in images.items())
    for kind, found in texts.items():
        assert sorted(number for number, *_ in found) == list(range(index.total("val", kind)))
        counts = N_SPARSE if kind == "sparse" else N_DENSE
        wanted = [(row, j) for row in range(21, 28) for j in range(counts[row % len(counts)])]
        for number, row, ids, mask in found:
            assert row == wanted[number][0]
            text = captions(row, N_SPARSE[row % 3], N_DENSE[row % 2])[kind == "dense"][wanted[number][1]]
            assert ids[mask].tolist() == PIPELINE.encode([text])[0][0].tolist()


def test_evaluation_in_processes_is_the_same(index):
    plain = list(eval_images(index, "val", config(), 3))
    other = list(eval_images(index, "val", config(loader_workers=2), 3))
    assert all(
        torch.equal(a, b) for x, y in zip(plain, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_missing_captions_and_sizes_are_named_at_the_start(tmp_path):
    index = ShardIndex.open(make_shards(tmp_path, {"train": 9}, n_sparse=[2, 0, 1], n_dense=[1, 1, 0]))
    with pytest.raises(
        ValueError, match=r"3 of 9 images of split 'train' have no dense caption, the first: k0002"
    ):
        batches(index)
    with pytest.raises(ValueError, match=r"3 of 9 images .* no sparse caption, the first: k0001"):
        batches(index, "sparse", 2, {"sparse": "one"})
    pairs = batches(index, "sparse", 9)
    assert pairs.steps_per_epoch == 1
    with pytest.raises(ValueError, match="batch_size is 10 but the split has 9 items"):
        batches(index, "sparse", 10)
    with pytest.raises(ValueError, match="batch_size is 9, which 2 workers"):
        batches(index, "sparse", 9, rank=0, world=2)
    with pytest.raises(ValueError, match=r"split 'val' of .* has no image"):
        list(eval_images(index, "val", config(), 2))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sparse": "some"}, "data.sparse is 'some': it must be 'all' or 'one'"),
        ({"image_size": 0}, "image_size is 0"),
        ({"crop_min": 0.0}, "crop_min is 0.0"),
        ({"word_augment": 1.5}, "word_augment is 1.5"),
        ({"loader_workers": -1}, "loader_workers is -1"),
    ],
)
def test_config_mistakes_are_one_line(fields, message):
    with pytest.raises(ValueError) as error:
        DataConfig(**fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_batch_moves_and_pickles(index):
    batch = next(batches(index).epoch(0))
    assert same(pickle.loads(pickle.dumps(batch.to("cpu"))), batch)
    assert len(batch) == 8


@pytest.mark.parametrize("processes, world", [(0, 1), (2, 1), (1, 2)])
def test_streamed_batches_have_fixed_steps(folder, processes, world):
    for rank in range(world):
        made = StreamBatches(
            str(folder / "train/{00000..00005}.tar"), builder(loader_workers=processes, sparse="one"),
            batch_size=8, samples_per_epoch=50, rank=rank, world=world,
        )  # fmt: skip
        found = list(made.epoch(0))
        assert len(found) == made.steps_per_epoch == 6
        assert len(list(made.epoch(0, start_step=5))) == 1
        assert all(len(batch) == 8 // world and batch.dense_mask.any(1).all() for batch in found)
        seen = set(torch.cat([batch.image_ids for batch in found]).tolist())
        assert seen <= set(range(1000, 1021))
        if world == 1 and processes == 0:
            assert len(seen) == 21
        again = list(made.epoch(0))
        assert all(same(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("processes", [0, 2])
def test_streaming_without_the_captions_asked_for_ends_in_one_line(tmp_path, processes):
    folder = make_shards(tmp_path, {"val": 7}, n_sparse=N_SPARSE, n_dense=[0])
    made = StreamBatches(
        str(folder / "val/{00000..00001}.tar"), builder(loader_workers=processes, sparse="one"),
        batch_size=4, samples_per_epoch=8,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"no usable sample .* no dense caption \(looked in dense\)"
    ) as error:
        list(made.epoch(0))
    assert "\n" not in str(error.value)


def test_a_stream_warns_of_what_it_cannot_do(folder):
    with pytest.warns(UserWarning, match="sparse is 'all'"):
        StreamBatches(str(folder / "train/00000.tar"), builder("sparse"), batch_size=4, samples_per_epoch=8)
