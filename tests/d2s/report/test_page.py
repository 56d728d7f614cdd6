"""The report: what it reads from a run, what it draws, and that it is safe and self-contained."""

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from small_set import make_model, make_set

from d2s.data.config import DataConfig
from d2s.evaluate.embed import Embeddings, TextSet, embed_split
from d2s.evaluate.metrics import recall_report
from d2s.report import charts
from d2s.report import command as report
from d2s.report.gallery import make_gallery
from d2s.report.runs import read_run
from d2s.shards.read.index import ShardIndex
from d2s.shards.read.records import ShardReader

EVIL = "<script>alert('x')</script>"


def row(kind: str, step: int, **values) -> dict:
    return {"kind": kind, "step": step, "epoch": step / 10, **values}


def scores(rsum: float) -> dict:
    sixth = rsum / 6
    both = {"i2t": 3.0, "t2i": 4.0}
    chance = {"i2t": [1.0, 5, 10], "t2i": [1.0, 5, 10], "rsum": 32}
    ranks = {"median_rank": both, "mean_rank": both, "queries": {"i2t": 9, "t2i": 18}}
    return {"rsum": rsum, "i2t": [sixth] * 3, "t2i": [sixth] * 3, **ranks, "chance": chance}


def write_run(folder, data, *, stage="finetune", rsums=(60.0, 90.0, 80.0), model=None):
    folder.mkdir(parents=True)
    config = {
        "recipe": "scenes_small",
        "stage": stage,
        "note": EVIL,
        "optim": {"lr": 1e-3, "betas": [0.9, 0.98]},
    }
    (folder / "config.json").write_text(json.dumps({"config": config, "data": str(data), "workers": 1}))
    rows = []
    for step in range(1, 31):
        rows.append(
            row("train", step, loss=9.0 / step, lr=1e-3, samples_per_s=100.0, seconds=2.0, grad_norm=math.nan)
        )
        if step % 10 == 0:
            found = scores(rsums[step // 10 - 1])
            rows.append(row("val", step, **found, **({"dense": found} if stage == "pretrain" else {})))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"cut off')
    if model is not None:
        model.save_pretrained(folder / "best")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    counts = {"train": [1], "val": [2] * 9, "test": [1, 2, 0, 3, 2, 1, 2]}
    return make_set(tmp_path_factory.mktemp("set"), counts)


@pytest.fixture(scope="module")
def model():
    return make_model()


def write_report(*runs, **options):
    return report.write_report([read_run(run) for run in runs], **options)


class Page(HTMLParser):
    """Collects tags, their attributes, and the text outside of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "img", "link", "wbr"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, "tags are closed in their order"

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if not self._open or self._open[-1] not in ("style", "script"):
            self.text += data + " "


def test_the_page_is_whole_safe_and_self_contained(data, model, tmp_path):
    run = write_run(tmp_path / f"run {EVIL.replace('/', '-')}", data, model=model)
    target = write_report(run)
    assert target == run / "report.html"
    assert not list(run.glob(".*")), "nothing temporary stays behind"
    text = target.read_text()
    page = Page(text)
    assert not page._open
    assert page.tags.count("script") == 1, "the page's own, and none from a name, a setting or a caption"
    assert "<b>bold</b>" not in text
    assert "<b>bold</b>" in page.text, "captions are shown as they are"
    assert not re.search(r"https?://|//cdn|@import", text)
    addresses = [value for name, value in page.attributes if name in ("src", "href")]
    assert addresses == []
    assert "default-src 'none'" in text
    for part in (
        "Recall",
        "Curves",
        "Text to image",
        "Image to text",
        "Similarities",
        "Settings",
        "optim",
        "0.001",
    ):
        assert part in page.text
    shown = set(re.findall(r'class="pic p(\d+)"', text))
    assert shown == set(re.findall(r"\.p(\d+)\{background-image:url\(data:image/jpeg;base64,/9j/", text))
    assert "90.0" in page.text, "the best validation, not the last"


def test_several_runs_stand_side_by_side(data, tmp_path):
    first = write_run(tmp_path / "first", data)
    second = write_run(tmp_path / "second", data, rsums=(10.0, 20.0, 30.0))
    (second / "test.json").write_text(json.dumps({"split": "test", **scores(123.0), "dense": scores(45.0)}))
    text = Page(write_report(first, second).read_text()).text
    for part in ("first", "second", "90.0", "30.0", "123.0", "45.0", "no best model yet"):
        assert part in text


def test_the_form_of_a_duration_fits_it(data, tmp_path):
    run = write_run(tmp_path / "run", data)
    assert ("1:00", "training", "m:ss, without validation") in read_run(run).facts()
    (run / "metrics.jsonl").write_text(json.dumps(row("train", 1, seconds=3661)) + "\n")
    assert ("1:01:01", "training", "h:mm:ss, without validation") in read_run(run).facts()


def test_an_empty_setting_is_shown_as_none(data, tmp_path):
    run = write_run(tmp_path / "run", data)
    (run / "config.json").write_text(json.dumps({"config": {"log": {"wandb": ""}}}))
    assert read_run(run).settings() == [("log", [("wandb", "none")])]


def test_long_names_of_settings_break_after_their_dots(data, tmp_path):
    run = write_run(tmp_path / "run", data)
    (run / "config.json").write_text(json.dumps({"config": {"model": {"a": {"b<": "c/d"}}}}))
    assert "<dt>a.<wbr>b&lt;</dt><dd>c/<wbr>d</dd>" in write_report(run).read_text()


def test_pretraining_is_judged_by_dense_captions(data, tmp_path):
    run = write_run(tmp_path / "run", data, stage="pretrain")
    rows = [row("val", step, **scores(100.0 - step), dense=scores(float(step))) for step in (10, 20, 30)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = read_run(run)
    assert found.validations() == [(1.0, 10.0), (2.0, 20.0), (3.0, 30.0)]
    assert [(r.captions, round(r.retrieval.rsum)) for r in found.recall_rows()] == [
        ("sparse", 70),
        ("dense", 30),
    ]


def test_the_split_shown_is_measured_too(data, model, tmp_path):
    run = write_run(tmp_path / "run", data, model=model)
    text = Page(write_report(run, split="test", data=data).read_text()).text
    assert "on the test split, 7 images, sparse captions" in text
    index = ShardIndex.open(data)
    found = embed_split(model, index, "test", config=DataConfig(image_size=32, loader_workers=0))
    wanted = recall_report(found.images, found.sparse.embeddings, found.sparse.owner)
    assert f"{wanted.rsum:.1f}" in text


def test_a_model_of_stage_1_is_shown_with_dense_captions(data, model, tmp_path):
    run = write_run(tmp_path / "run", data, stage="pretrain", model=model)
    text = Page(write_report(run).read_text()).text
    assert "on the val split, 9 images, dense captions" in text


def test_gallery_by_hand(data):
    """Seven images, their embeddings the axes; captions are placed so that the ranks are known."""
    index = ShardIndex.open(data)
    counts = index.column("n_sparse")[index.rows("test").start : index.rows("test").stop].tolist()
    owner = torch.repeat_interleave(torch.arange(7), torch.tensor(counts))
    images = torch.eye(7)
    texts = images[owner].clone()
    # The first caption lies nearest to all the other images; its own comes last.
    first = int(owner[0])
    texts[0] = torch.linspace(0.5, 1.0, 7).roll(0)
    texts[0, first] = 0.1
    found = make_gallery(
        index,
        "test",
        Embeddings(images=images, sparse=TextSet(embeddings=texts, owner=owner, truncated=0), dense=None),
        per_outcome=3,
    )
    assert found.t2i.percent == pytest.approx({"hit": 100 * 10 / 11, "near": 0, "miss": 100 / 11})
    miss = [query for query in found.t2i.queries if query.outcome == "miss"]
    assert len(miss) == 1
    assert miss[0].rank == 7
    assert [answer.rank for answer in miss[0].answers] == [1, 2, 3, 4, 5, 7]
    assert [answer.image for answer in miss[0].answers if answer.right] == [first]
    assert miss[0].answers[-1].right
    hits = [query for query in found.t2i.queries if query.outcome == "hit"]
    assert len(hits) == 3
    assert all(query.answers[0].right and query.answers[0].image == query.image for query in hits)
    record = ShardReader(index).record(index.rows("test")[hits[0].image])
    assert hits[0].text in record.sparse
    report_ = recall_report(images, texts, owner)
    assert found.t2i.won == pytest.approx(report_.t2i.hits[0])
    assert found.i2t.won == pytest.approx(report_.i2t.hits[0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{tmp}/none"], "no such run folder"),
        (["{tmp}"], "is no run: it has neither config.json nor metrics.jsonl"),
        (["{run}", "--data={tmp}/none"], "no folder"),
        (["{run}", "--data={data}", "--split=tset"], "split 'tset'"),
        (["{run}", "--data={data}"], "give a folder of save_pretrained"),
        (["{run}", "--batch-size=0"], "argument --batch-size: '0'"),
        (["{broken}"], "metrics.jsonl has a line that is not JSON"),
        (["{run}", "--device=meta"], "--device meta: cannot be used here"),
    ],
)
def test_mistakes_are_one_line(data, tmp_path, capsys, arguments, message):
    run = write_run(tmp_path / "run", data)
    broken = write_run(tmp_path / "broken", data)
    (broken / "metrics.jsonl").write_text("nonsense\n")
    places = {"tmp": tmp_path, "run": run, "broken": broken, "data": data}
    try:
        code = report.main([argument.format(**places) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert message in error


def test_a_broken_evaluation_is_named(data, tmp_path, capsys):
    run = write_run(tmp_path / "run", data)
    (run / "test.json").write_text('{"split": ')
    assert report.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{run / 'test.json'}: line 1: not JSON" in error


def test_no_place_for_the_report_is_one_line(data, tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", data)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr("os.fsync", full)
        assert report.main([str(run)]) == 2
    assert capsys.readouterr().err == f"error: {run / 'report.html'}: No space left on device\n"
    (run / "report.html").mkdir()
    assert report.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert "report.html is a folder" in error
    assert error.count("\n") == 1


def test_a_usage_error_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        report.main(["--splitt=val"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_command_prints_where_it_wrote(data, tmp_path, capsys):
    run = write_run(tmp_path / "run", data)
    assert report.main([str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize(
    "low, high, wanted",
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 0.0012, None),
        (-3, 3, None),
        (5, 5, [5]),
        (0, 163.2, [0, 50, 100, 150]),
    ],
)
def test_ticks_are_round_and_inside(low, high, wanted):
    found = charts.ticks(low, high)
    if wanted is not None:
        assert found == pytest.approx(wanted)
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)
    assert len(found) >= 3 or low == high
    mantissas = {f"{value:e}"[:4].rstrip("0.").lstrip("-") for value in np.diff(found)}
    assert mantissas <= {"1", "2", "2.5", "5"}


def test_charts_bear_anything():
    def lines(*points, smooth=False):
        series = charts.Series(name="a", points=points, smooth=smooth)
        return charts.line_chart([series], "title", "", x_label="epoch", x_max=0.0, from_zero=False)

    assert "nan" not in repr(lines((1, 1.0), (2, math.nan), (3, math.inf)))
    assert lines() is None
    flat = repr(lines(*((x, 2.0) for x in range(5000)), smooth=True))
    assert "nan" not in flat
    assert len(flat) < 60_000
    same = charts.histogram([(np.full(9, 0.5), 1), (np.full(9, 0.5), 2)], "title", "", x_label="similarity")
    assert "nan" not in repr(same)
    assert [kind for kind, _, _ in same.shapes] == ["area", "mean"] * 2
    assert charts.histogram([(np.full(9, math.nan), 1)], "title", "", x_label="similarity") is None


def test_the_picture_is_one_image_with_a_legend(data, model, tmp_path, capsys):
    first = write_run(tmp_path / "a<b", data, model=model)
    second = write_run(tmp_path / "second", data)
    target = tmp_path / "picture.svg"
    assert report.main([str(first), str(second), "--picture", str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    root = ElementTree.parse(target).getroot()
    text = " ".join(root.itertext())
    assert all(part in text for part in ("Loss", "Validation rSum", "epoch", "a<b", "second"))
    assert len(list(root.iter("{http://www.w3.org/2000/svg}image"))) >= 5
    shapes = [element.get("class") for element in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert shapes.count("line s1") == shapes.count("line s2") == 2
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|var\(", target.read_text())
    (second / "metrics.jsonl").write_text("")
    assert report.main([str(second), "--picture", str(target)]) == 2
    assert "metrics.jsonl has no rows yet" in capsys.readouterr().err


def test_moving_average_does_not_lag():
    values = np.arange(200.0)
    assert charts.average(values)[5:-5] == pytest.approx(values[5:-5])
    assert charts.average(np.tile([0.0, 1.0], 100))[50:150].std() < 0.1
