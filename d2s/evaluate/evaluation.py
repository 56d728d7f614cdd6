"""Evaluates a model on a split: `python -m d2s.evaluate --model DIR --data DIR --split test [--json FILE]`.

Both kinds of captions are embedded by the one function that `encode_text` uses, so what is measured is what a
user gets. Images are embedded once each, captions once each.
"""

import argparse
import io
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.text import Text
from torch import Tensor

from d2s.common import command
from d2s.common.files import read_json, write_json
from d2s.data.batches import DataConfig
from d2s.evaluate import capacity
from d2s.evaluate.embed import Embeddings, embed_split
from d2s.evaluate.metrics import Retrieval, fold_report, normalize, recall_report
from d2s.evaluate.tables import capacity_table, recall_table
from d2s.model import D2SModel
from d2s.shards.read.index import ShardIndex
from d2s.workers.group import in_full_precision

FOLD = 1000


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate_model` measured on one split."""

    split: str
    images: int
    captions: int
    dense_captions: int
    """0 where there are none or they were not asked for."""
    without_captions: int
    """Images without a sparse caption: no query of image -> text, but candidates of text -> image."""
    truncated: int
    """Sparse and dense captions that were cut at the limit of word pieces."""
    sparse: Retrieval | None
    """Images and sparse captions; None where the split has none of them."""
    dense: Retrieval | None
    """Images and dense captions."""
    folds: int
    """Number of folds in `folded`, 0 for none."""
    folded: Retrieval | None
    """Mean over the folds, sparse captions: COCO 1K when `images` is 5,000 and `folds` 5."""
    capacity: dict[str, float]
    """Measures of information capacity by name, `d2s.evaluate.capacity`; empty unless asked for."""
    seconds: float
    """Wall-clock time, embedding included."""

    @property
    def rsum(self) -> float:
        """rSum over sparse captions, 600 at most; NaN where the split has none."""
        return self.sparse.rsum if self.sparse else math.nan

    def to_dict(self) -> dict:
        """Plain numbers, lists and dictionaries, for JSON; what was not measured is left out."""
        result = {
            "split": self.split,
            "images": self.images,
            "captions": self.captions,
            "dense_captions": self.dense_captions,
            "without_captions": self.without_captions,
            "truncated": self.truncated,
            "seconds": round(self.seconds, 3),
        }
        if self.sparse:
            result |= self.sparse.to_dict()
        if self.dense:
            result["dense"] = self.dense.to_dict()
        if self.folded:
            result["folds"] = {"number": self.folds, **self.folded.to_dict()}
        if self.capacity:
            result["capacity"] = {name: _json(value) for name, value in self.capacity.items()}
        return result

    def table(self) -> str:
        """The tables as plain text, without colour."""
        console = Console(file=io.StringIO(), width=110, color_system=None)
        console.print(self.renderable())
        return console.file.getvalue().rstrip("\n")

    def renderable(self) -> Group:
        """The same for a rich console."""
        rows = [("sparse captions", self.sparse)] if self.sparse else []
        if self.folded:
            rows.append((f"sparse, mean of {self.folds} folds", self.folded))
        if self.dense:
            rows.append(("dense captions", self.dense))
        title = (
            f"{self.split}: {self.images:,} images, {self.captions:,} sparse, {self.dense_captions:,} dense"
        )
        parts = [recall_table(rows, title + " captions")]
        if self.capacity:
            parts.append(capacity_table(self.capacity))
        if self.without_captions:
            parts.append(
                Text(
                    f"{self.without_captions} images have no sparse caption: no queries of image->text, but"
                    " candidates of text->image"
                )
            )
        if self.truncated:
            parts.append(Text(f"{self.truncated} captions were longer than the limit of word pieces and cut"))
        return Group(*parts)


def evaluate_model(
    model: D2SModel,
    index: ShardIndex,
    split: str,
    *,
    data_config: DataConfig,
    batch_size: int = 128,
    rank: int = 0,
    world: int = 1,
    dense: bool = True,
    full: bool = True,
    folds: int | None = None,
    poll: Callable[[], None] | None = None,
) -> Evaluation:
    """Embeds a split and measures retrieval; the same result on every worker and for every number of workers.

    All workers of the process group must call it together. The model is left in the mode (training or not) in
    which it came.

    Args:
        dense: also image <-> dense captions, where the split has any.
        full: also the folds and the measures of capacity.
        folds: number of folds; None means folds of 1,000 images where the split is several thousands exactly,
            and 0 none. Folds are cut along ascending image ids, whatever the order in the shards; the Karpathy
            file of COCO has another order, so its 1K numbers come from other folds.
        poll: called before each batch, on all workers alike; what it raises ends the evaluation.

    Raises:
        ValueError: no such split, no caption in it, folds that do not divide it, or embeddings not finite.
    """
    start = time.monotonic()
    if full:
        choose_folds(len(index.rows(split)), folds)
    embedded = embed_split(
        model,
        index,
        split,
        config=data_config,
        batch_size=batch_size,
        rank=rank,
        world=world,
        dense=dense,
        poll=poll,
    )
    result = evaluate_embeddings(embedded, index, split, full=full, folds=folds)
    return replace(result, seconds=time.monotonic() - start)


def evaluate_embeddings(
    embedded: Embeddings, index: ShardIndex, split: str, *, full: bool = True, folds: int | None = None
) -> Evaluation:
    """`evaluate_model` for a split that is embedded already; the arguments are the same."""
    start = time.monotonic()
    sparse_set, dense_set = embedded.sparse, embedded.dense
    if sparse_set is None and dense_set is None:
        raise ValueError(f"split {split!r} of {index.root} has no caption: choose another split")
    images = len(embedded.images)
    folds = choose_folds(images, folds) if full else 0
    found = {
        name: recall_report(embedded.images, texts.embeddings, texts.owner)
        for name, texts in (("sparse", sparse_set), ("dense", dense_set))
        if texts is not None
    }
    folded = _by_folds(embedded, index, split, folds) if folds and sparse_set is not None else None
    return Evaluation(
        split=split,
        images=images,
        captions=0 if sparse_set is None else len(sparse_set.owner),
        dense_captions=0 if dense_set is None else len(dense_set.owner),
        without_captions=images - found["sparse"].i2t.queries if "sparse" in found else images,
        truncated=sum(texts.truncated for texts in (sparse_set, dense_set) if texts is not None),
        sparse=found.get("sparse"),
        dense=found.get("dense"),
        folds=folds if folded else 0,
        folded=folded,
        capacity=measure_capacity(embedded) if full else {},
        seconds=time.monotonic() - start,
    )


def _by_folds(embedded: Embeddings, index: ShardIndex, split: str, folds: int) -> Retrieval:
    """Folds of the images by ascending id."""
    rows, texts = index.rows(split), embedded.sparse
    ids = torch.tensor(index.column("image_id")[rows.start : rows.stop])
    order = torch.argsort(ids)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    device = embedded.images.device
    images = embedded.images[order.to(device)]
    return fold_report(images, texts.embeddings, place.to(device)[texts.owner], folds=folds)


def choose_folds(images: int, folds: int | None) -> int:
    """The number of folds for so many images; see `evaluate_model`.

    Raises:
        ValueError: `folds` does not divide the images.
    """
    if folds is None:
        return images // FOLD if images > FOLD and images % FOLD == 0 else 0
    if folds < 0 or (folds and images % folds):
        raise ValueError(
            f"--folds {folds} does not divide the split's {images} images: choose a divisor or 0"
        )
    return 0 if folds == 1 else folds


def measure_capacity(embedded: Embeddings) -> dict[str, float]:
    """Every measure of `d2s.evaluate.capacity` that the embeddings allow, by name."""
    images = normalize(embedded.images)
    result = {"effective_rank_images": capacity.effective_rank(images)}
    unit: dict[str, Tensor] = {}
    for kind, texts in (("sparse", embedded.sparse), ("dense", embedded.dense)):
        if texts is None:
            continue
        unit[kind] = normalize(texts.embeddings)
        result[f"effective_rank_{kind}"] = capacity.effective_rank(unit[kind])
        result[f"alignment_{kind}"] = capacity.alignment(images, unit[kind], texts.owner)
        result[f"uniformity_{kind}"] = capacity.uniformity(unit[kind])
        result[f"modality_gap_{kind}"] = capacity.modality_gap(images, unit[kind])
    result["uniformity_images"] = capacity.uniformity(images)
    if len(unit) == 2:
        result["cosine_sparse_dense"] = capacity.sparse_to_dense(
            unit["sparse"], embedded.sparse.owner, unit["dense"], embedded.dense.owner, len(images)
        )
    return result


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 2 after one line on what is wrong; a usage error exits with 2."""
    arguments = _parser().parse_args(argv)
    return command.run(lambda: _tell(_run(arguments), arguments))


def _tell(result: Evaluation, arguments: argparse.Namespace) -> None:
    # Wide enough for the whole table where the output goes to a file.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(result.renderable())
    if arguments.json is not None:
        written = {"model": str(arguments.model), "data": str(arguments.data), **result.to_dict()}
        write_json(arguments.json, written)


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(prog="python -m d2s.evaluate", description="Evaluate a model on a split.")
    parser.add_argument("--model", type=Path, required=True, help="model folder, such as runs/NAME/best")
    parser.add_argument("--data", type=Path, required=True, help="data set made by python -m d2s.shard")
    parser.add_argument("--split", default="test", help="split of the data set (default: test)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument("--batch-size", type=int, default=128, help="images or captions at a time (128)")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1 ... (default: cuda if there)")
    parser.add_argument(
        "--folds",
        type=int,
        help="folds to average over, 0 for none (default: of 1,000 images); they are cut along ascending image"
        " ids, not in the order of the Karpathy file, so COCO 1K differs a little from that order's",
    )
    parser.add_argument("--no-dense", action="store_true", help="leave dense captions out")
    return parser


def _run(arguments: argparse.Namespace) -> Evaluation:
    """Checks everything that can be checked before any long work, then evaluates."""
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size is {arguments.batch_size}: it must be 1 or more")
    if arguments.json is not None:
        check_output(arguments.json)
    device = choose_device(arguments.device)
    index = ShardIndex.open(arguments.data)
    choose_folds(len(index.rows(arguments.split)), arguments.folds)
    model = load_model(arguments.model).to(device)
    return evaluate_model(
        model,
        index,
        arguments.split,
        data_config=data_config_of(arguments.model, model),
        batch_size=arguments.batch_size,
        dense=not arguments.no_dense,
        folds=arguments.folds,
    )


def check_output(path: Path) -> None:
    """Raises ValueError when `path` cannot be written to."""
    if path.is_dir():
        raise ValueError(f"--json {path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"--json {path}: there is no folder {path.parent}: make it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--json {path}: the folder {path.parent} is not writable: choose another")


def choose_device(name: str) -> torch.device:
    """The device of that name; without a name CUDA where there is one, or else the CPU.

    Raises:
        ValueError: no such device here.
    """
    in_full_precision()
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r} is not a device: use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here: use cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError, ImportError):
        raise ValueError(f"--device {name}: cannot be used here: use cpu, cuda or cuda:N") from None
    return device


def load_model(folder: Path) -> D2SModel:
    """The model in a folder that `save_pretrained` wrote, in evaluation mode.

    Raises:
        ValueError: the folder holds no model; a run folder is told apart.
    """
    if (folder / "best" / "config.json").is_file():
        raise ValueError(f"--model {folder} is a run, not a model: use {folder / 'best'}")
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        raise ValueError(f"--model {folder} {what}: give a folder of save_pretrained, such as runs/NAME/best")
    return D2SModel.from_pretrained(folder).eval()


def data_config_of(folder: Path, model: D2SModel) -> DataConfig:
    """How the model was fed in training, from the run around its folder; the defaults where there is no run.

    The image size is the model's own in any case.

    Raises:
        ValueError: the run's config.json is broken or has values of a wrong type.
    """
    settings = folder.resolve().parent / "config.json"
    known = DataConfig(image_size=model.config.image_size)
    if not settings.is_file():
        return known
    run = read_json(settings)
    config = run.get("config", {}) if isinstance(run, dict) else None
    values = config.get("data", {}) if isinstance(config, dict) else None
    if not isinstance(values, dict):
        raise ValueError(
            f"{settings}: does not hold a run's settings, config and in it data: mend or remove it"
        )
    names = ("max_words_sparse", "max_words_dense", "loader_workers")
    kept = {name: values[name] for name in names if name in values}
    try:
        return replace(known, **kept)
    except ValueError as error:
        raise ValueError(f"{settings}: {error}") from None
