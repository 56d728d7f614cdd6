"""Evaluation of a model on a split: the numbers, the command, its mistakes, several workers."""

import io
import json
import math

import forked
import pytest
import torch
from rich.console import Console
from small_set import make_model, make_set

from d2s.data.config import DataConfig
from d2s.evaluate import command
from d2s.evaluate.embed import embed_split
from d2s.evaluate.evaluation import choose_folds, evaluate_model
from d2s.evaluate.inputs import data_config_of
from d2s.evaluate.metrics import recall_report
from d2s.shards.format.manifest import read_manifest
from d2s.shards.read.index import ShardIndex

CONFIG = DataConfig(image_size=32, loader_workers=0)
COUNTS = [1, 3, 0, 2, 5, 1, 2, 4, 1, 2, 0, 3]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set"), {"train": [1] * 3, "val": [2] * 4, "test": COUNTS})


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("run") / "best"
    model.save_pretrained(folder)
    return folder


def test_embeds_what_encode_gives(data, model):
    index = ShardIndex.open(data)
    found = embed_split(model, index, "test", config=CONFIG, batch_size=5)
    table = read_manifest(data, split="test").to_pylist()
    assert [len(row["sparse"]) for row in table] == torch.bincount(found.sparse.owner, minlength=12).tolist()
    texts = [text for row in table for text in row["sparse"]]
    long = [text for row in table for text in row["dense"]]
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(found.sparse.embeddings), model.encode_text(texts), atol=1e-5, rtol=0)
    torch.testing.assert_close(unit(found.dense.embeddings), model.encode_text(long), atol=1e-5, rtol=0)
    pictures = [str(data.parent / "pictures" / row["source_id"]) for row in table]
    torch.testing.assert_close(found.images, model.encode_image(pictures), atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_does_not_depend_on_the_batch_size(data, model, batch_size):
    index = ShardIndex.open(data)
    wanted = embed_split(model, index, "test", config=CONFIG, batch_size=7)
    found = embed_split(model, index, "test", config=CONFIG, batch_size=batch_size)
    for a, b in (
        (found.images, wanted.images),
        (found.sparse.embeddings, wanted.sparse.embeddings),
        (found.dense.embeddings, wanted.dense.embeddings),
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_evaluation_counts_and_agrees_with_the_metrics(data, model):
    index = ShardIndex.open(data)
    result = evaluate_model(model, index, "test", data_config=CONFIG, folds=3)
    found = embed_split(model, index, "test", config=CONFIG)
    assert result.sparse == recall_report(found.images, found.sparse.embeddings, found.sparse.owner)
    assert (result.images, result.captions, result.dense_captions) == (12, sum(COUNTS), 12)
    assert result.without_captions == 2
    assert result.sparse.i2t.queries == 10
    assert result.folds == 3
    assert result.folded.t2i.candidates == 4
    assert result.rsum == pytest.approx(sum(result.sparse.i2t.hits) + sum(result.sparse.t2i.hits))
    assert 1 <= result.capacity["effective_rank_sparse"] <= 16
    assert -1 <= result.capacity["cosine_sparse_dense"] <= 1
    console = Console(file=io.StringIO(), width=110)
    console.print(result.renderable())
    text = console.file.getvalue()
    for part in ("chance", "mean of 3 folds", "dense captions", "effective rank", "2 images have no sparse"):
        assert part in text
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["rsum"] == result.rsum
    assert written["i2t"] == list(result.sparse.i2t.hits)
    assert written["dense"]["rsum"] == result.dense.rsum
    assert written["folds"]["number"] == 3


def test_folds_follow_image_ids_and_not_the_order_of_the_shards(data, model):
    index = ShardIndex.open(data)
    ids = index.column("image_id")[index.rows("test").start : index.rows("test").stop]
    assert ids.tolist() != sorted(ids.tolist()), "the build shuffles, so the test means something"
    found = embed_split(model, index, "test", config=CONFIG)
    totals = []
    for part in sorted(ids.tolist())[:6], sorted(ids.tolist())[6:]:
        kept = torch.tensor([place for place, image in enumerate(ids.tolist()) if image in part])
        inside = torch.isin(found.sparse.owner, kept)
        owner = torch.searchsorted(kept, found.sparse.owner[inside])
        totals.append(recall_report(found.images[kept], found.sparse.embeddings[inside], owner).rsum)
    result = evaluate_model(model, index, "test", data_config=CONFIG, folds=2)
    assert result.folded.rsum == pytest.approx(sum(totals) / 2)


@pytest.mark.parametrize(
    "images, folds, wanted",
    [
        (5000, None, 5),
        (1000, None, 0),
        (1500, None, 0),
        (500, None, 0),
        (5000, 0, 0),
        (12, 4, 4),
        (5000, 1, 0),
    ],
)
def test_number_of_folds(images, folds, wanted):
    assert choose_folds(images, folds) == wanted


def test_the_quick_form_leaves_the_rest_out(data, model):
    index = ShardIndex.open(data)
    model.train()
    result = evaluate_model(model, index, "val", data_config=CONFIG, dense=False, full=False)
    assert model.training, "the mode is given back"
    model.eval()
    assert result.dense is None
    assert result.capacity == {}
    assert result.folds == 0
    again = evaluate_model(model, index, "val", data_config=CONFIG, dense=False, full=False)
    assert again.rsum == result.rsum, "evaluated without dropout, whatever the mode before"


def test_a_collapsed_model_scores_at_most_chance(data, model):
    class Collapsed(type(model)):
        def forward_image(self, images, draw_seeds=None):
            return torch.ones_like(super().forward_image(images))

    collapsed = make_model()
    collapsed.__class__ = Collapsed
    result = evaluate_model(collapsed, ShardIndex.open(data), "test", data_config=CONFIG, full=False)
    # Every image looks the same: no caption finds its own among the twelve.
    assert result.sparse.t2i.hits == (0, 0, 0)


def test_a_model_of_nan_is_an_error_and_not_a_score(data):
    broken = make_model()
    with torch.no_grad():
        broken.image_encoder.linear.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="image embeddings: 4 of 4 rows are not finite"):
        evaluate_model(broken, ShardIndex.open(data), "val", data_config=CONFIG)


def test_cut_captions_are_counted_once(data, model):
    short = DataConfig(image_size=32, loader_workers=0, max_words_dense=8)
    for batch_size in (5, 12, 100):
        found = embed_split(model, ShardIndex.open(data), "test", config=short, batch_size=batch_size)
        assert (found.sparse.truncated, found.dense.truncated) == (0, 12)


def test_the_command_prints_a_table_and_writes_json(data, model_folder, tmp_path, capsys):
    target = tmp_path / "out.json"
    target.write_text("old")
    code = command.main(
        [f"--model={model_folder}", f"--data={data}", "--split=test", f"--json={target}", "--batch-size=8"]
    )
    assert code == 0
    out = capsys.readouterr().out
    assert "sparse captions" in out
    assert "chance" in out
    written = json.loads(target.read_text())
    assert written["split"] == "test"
    assert len(written["i2t"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--model": "nowhere"}, "--model nowhere is no folder: give a folder of save_pretrained"),
        ({"--model": "{run}"}, "is a run, not a model: use"),
        ({"--model": "{empty}"}, "has no config.json"),
        ({"--data": "nowhere"}, "no folder"),
        ({"--data": "{empty}"}, "has no manifest"),
        ({"--split": "tset"}, "train (3), val (4), test (12)"),
        ({"--json": "{empty}"}, "is a folder: name a file in it"),
        ({"--json": "{empty}/deep/out.json"}, "there is no folder"),
        ({"--folds": "5"}, "--folds 5 does not divide the split's 12 images"),
        ({"--device": "abacus"}, "--device abacus: cannot be used here"),
        ({"--device": "cuda:99"}, "CUDA devices): use cpu, cuda or cuda:N"),
        ({"--device": "meta"}, "--device meta: cannot be used here"),
        ({"--device": "mps"}, "--device mps: cannot be used here"),
    ],
)
def test_mistakes_are_one_line(data, model_folder, tmp_path, capsys, change, message):
    given = {"--model": str(model_folder), "--data": str(data), "--split": "test"} | change
    places = {"run": model_folder.parent, "empty": tmp_path}
    code = command.main([f"{name}={value.format(**places)}" for name, value in given.items()])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert message in error


def test_a_usage_error_is_one_line(capsys):
    for arguments in (
        [],
        ["--model=a", "--data=b", "--folds=x"],
        ["--model=a", "--data=b", "--batch-size=0"],
        ["--model=a", "--data=b", "--colour"],
    ):
        with pytest.raises(SystemExit) as stop:
            command.main(arguments)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_an_error_of_the_machine_is_one_line(data, model_folder, tmp_path, capsys, monkeypatch):
    def full(path, value):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(command, "write_json", full)
    given = [f"--model={model_folder}", f"--data={data}", f"--json={tmp_path}/out.json", "--no-dense"]
    assert command.main(given) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/out.json: Permission denied\n"


def test_help_tells_the_order_of_the_folds(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "ascending image ids, not in the order of the Karpathy file" in " ".join(
        capsys.readouterr().out.split()
    )


def test_broken_settings_of_the_run_are_named(tmp_path, model):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON") as caught:
        data_config_of(tmp_path / "best", model)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(caught.value)


def test_settings_come_from_the_run_around_the_model(tmp_path, model):
    (tmp_path / "config.json").write_text(
        json.dumps({"config": {"data": {"max_words_dense": 99, "image_size": 7}}})
    )
    found = data_config_of(tmp_path / "best", model)
    assert (found.max_words_dense, found.image_size) == (99, 32)
    assert data_config_of(tmp_path / "elsewhere" / "best", model) == DataConfig(image_size=32)


def _worker(rank: int, world: int, data: str, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    result = evaluate_model(make_model(), ShardIndex.open(data), "test", data_config=CONFIG, batch_size=5)
    with open(f"{out}/{rank}.json", "w") as file:
        json.dump({**result.to_dict(), "seconds": 0}, file)
    torch.distributed.barrier()


@pytest.mark.dist
def test_two_workers_measure_what_one_does(data, model, tmp_path):
    forked.context()
    given = (2, str(data), str(tmp_path / "store"), str(tmp_path))
    torch.multiprocessing.start_processes(_worker, given, nprocs=2, start_method="forkserver")
    alone = evaluate_model(model, ShardIndex.open(data), "test", data_config=CONFIG).to_dict()
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert both[0] == both[1]
    for name in ("i2t", "t2i", "rsum", "median_rank", "truncated", "captions"):
        assert both[0][name] == alone[name]
    for name, value in alone["capacity"].items():
        assert both[0]["capacity"][name] == pytest.approx(value, abs=1e-4)
