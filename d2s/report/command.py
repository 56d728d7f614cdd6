"""Writes a run's report: `python -m d2s.report RUN [RUN ...] [--data DIR] [--split val]`.

The page goes to RUN/report.html of the first run; further runs are drawn beside it. Curves and recall come from
the run's own files; the pictures are made by running its best model on a split.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from d2s.common import command
from d2s.common.files import atomic_file
from d2s.evaluate.embed import embed_split
from d2s.evaluate.evaluation import evaluate_embeddings
from d2s.evaluate.inputs import choose_device, data_config_of, load_model
from d2s.evaluate.tables import recall_table
from d2s.report.gallery import Gallery, make_gallery
from d2s.report.page import page
from d2s.report.runs import Run, read_run
from d2s.shards.read.index import ShardIndex


def write_report(
    run_dir: str | Path,
    *others: str | Path,
    data: str | Path | None = None,
    split: str = "val",
    device: str = "",
    batch_size: int = 128,
) -> Path:
    """Writes `run_dir`/report.html, whole or not at all, and returns its path.

    Args:
        others: further runs, for the curves and the recall table.
        data: the data set for the pictures; None takes the one that the run was trained on, and where that or the
            run's best model is not there, the page says so in place of the pictures.
        split: of the pictures. The default leaves the test split alone.
        device: as in `d2s.evaluate`.

    Raises:
        ValueError: no run there, a file that cannot be read, or data, split or model that do not fit.
    """
    runs = [read_run(Path(path)) for path in (run_dir, *others)]
    run = runs[0]
    target = run.path / "report.html"
    if target.is_dir():
        raise ValueError(f"{target} is a folder, where the report would go: move it away")
    place = choose_device(device)
    rows = [row for one in runs for row in one.recall_rows()]
    index, why = _find_data(run, data)
    gallery, gallery_of, capacity = None, "", {}
    if index is not None:
        gallery, numbers = _look(run, index, split, place, batch_size)
        size = f"{numbers['images']:,} images, {gallery.kind} captions"
        gallery_of = f"The best model of {run.name} on the {split} split, {size}"
        capacity = numbers["capacity"]
        if split != "val" and not any(row.run == run.name and row.split == split for row in rows):
            end = sum(row.run == run.name for row in rows)
            rows[end:end] = run.rows_of(split, numbers)
    text = page(runs, rows, gallery=gallery, gallery_of=gallery_of, capacity=capacity, why_no_gallery=why)
    with atomic_file(target) as file:
        file.write(text.encode())
    return target


def _find_data(run: Run, data: str | Path | None) -> tuple[ShardIndex | None, str]:
    """The data set for the pictures, or None and the reason why there is none."""
    if data is not None:
        return ShardIndex.open(data), ""
    known = run.config.get("data")
    if not (run.path / "best" / "config.json").is_file():
        return None, "The run has no best model yet, so there is nothing to show."
    if not known or not (Path(known) / "manifest.parquet").is_file():
        return None, f"The data set {known or ''} is not here; give it with --data to see pictures."
    return ShardIndex.open(known), ""


def _look(
    run: Run, index: ShardIndex, split: str, device: torch.device, batch_size: int
) -> tuple[Gallery, dict]:
    """The gallery of a split, and the numbers of its evaluation."""
    index.rows(split)
    folder = run.path / "best"
    model = load_model(folder).to(device)
    config = data_config_of(folder, model)
    embedded = embed_split(model, index, split, config=config, batch_size=batch_size)
    numbers = evaluate_embeddings(embedded, index, split).to_dict()
    # Shown are the captions that the stage aligns: of a model of stage 1, sparse ones say little.
    return make_gallery(index, split, embedded, kind=run.aligned), numbers


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 2 after one line on what is wrong; a usage error exits with 2."""
    parser = command.Parser(
        prog="python -m d2s.report", description="Write RUN/report.html: curves, recall, pictures, settings."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder; more to compare with")
    parser.add_argument("--data", type=Path, help="data set for the pictures (default: the run's own)")
    parser.add_argument("--split", default="val", help="split of the pictures (default: val)")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1 ... (default: cuda if there)")
    parser.add_argument("--batch-size", type=int, default=128, help="images or captions at a time (128)")
    arguments = parser.parse_args(argv)
    return command.run(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    """Writes the report and tells where. Raises ValueError and OSError."""
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size is {arguments.batch_size}: it must be 1 or more")
    target = write_report(
        *arguments.runs,
        data=arguments.data,
        split=arguments.split,
        device=arguments.device,
        batch_size=arguments.batch_size,
    )
    runs = [read_run(run) for run in arguments.runs]
    rows = [
        (f"{row.run}: {row.split}, {row.captions}", row.retrieval)
        for run in runs
        for row in run.recall_rows()
    ]
    console = Console() if sys.stdout.isatty() else Console(width=130)
    if rows:
        console.print(recall_table(rows, chance=False))
    print(f"{target} ({target.stat().st_size / 1e6:.1f} MB)")
