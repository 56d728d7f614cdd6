"""Writes a run's report: `python -m d2s.report RUN [RUN ...] [--data DIR] [--split val] [--picture FILE.svg]`.

Writes RUN/report.html for the first run. Further runs appear in its curves and tables for comparison. Curves and
recall come from the files in the run folders. For the pictures, the first run's best model is evaluated on a split.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from d2s.common import command
from d2s.common.command import positive, user_path
from d2s.common.files import write_text
from d2s.evaluate.embed import embed_split
from d2s.evaluate.evaluation import evaluate_embeddings
from d2s.evaluate.inputs import choose_device, data_config_of, load_model
from d2s.evaluate.tables import recall_table
from d2s.report.gallery import Gallery, make_gallery
from d2s.report.page import render_page, render_picture
from d2s.report.runs import Run, read_run
from d2s.shards.read.index import ShardIndex


def write_report(
    runs: Sequence[Run],
    *,
    data: Path | None = None,
    split: str = "val",
    device: str = "",
    batch_size: int = 128,
    picture: Path | None = None,
) -> Path:
    """Writes report.html atomically into the folder of the first run and returns its path.

    Args:
        runs: the run that the report describes, then runs to compare it with in the curves and the recall table.
        data: the data set for the pictures. None selects the run's training data set. If this data set
            or the run's best model is missing, the page shows the reason instead of the pictures.
        split: the split that the pictures come from.
        device: as in `d2s.evaluate`.
        batch_size: number of images or captions that are embedded at a time.
        picture: path of an SVG file for a README. It gets curves and a few queries. None writes no such file.

    Raises:
        ValueError: data set, split or model cannot be used, report.html is a folder, or `picture` would be empty.
    """
    run = runs[0]
    target = run.path / "report.html"
    if target.is_dir():
        raise ValueError(f"{target} is a folder, where the report would go: move it away")
    torch_device = choose_device(device)
    rows = [row for one in runs for row in one.recall_rows()]
    index, no_gallery = _find_data(run, data)
    gallery, gallery_source, capacity = None, "", {}
    if index is not None:
        gallery, numbers = _evaluate(run, index, split, torch_device, batch_size)
        gallery_source = (
            f"The best model of {run.name} on the {split} split, {numbers['images']:,} images, "
            f"{gallery.kind} captions"
        )
        capacity = numbers["capacity"]
        if split != "val" and not any(row.run == run.name and row.split == split for row in rows):
            end = sum(row.run == run.name for row in rows)
            rows[end:end] = run.rows_of(split, numbers)
    text = render_page(
        runs, rows, gallery=gallery, gallery_source=gallery_source, capacity=capacity, no_gallery=no_gallery
    )
    write_text(target, text)
    if picture:
        write_text(picture, render_picture(runs, gallery))
    return target


def _find_data(run: Run, data: Path | None) -> tuple[ShardIndex | None, str]:
    """Returns (data set for the pictures, ""), or (None, reason why no pictures can be shown)."""
    if data is not None:
        return ShardIndex.open(data), ""
    known = run.config.get("data")
    if not (run.path / "best" / "config.json").is_file():
        return None, "The run has no best model yet, so there is nothing to show."
    if not known or not (Path(known) / "manifest.parquet").is_file():
        return None, f"The data set {known or ''} is not here; give it with --data to see pictures."
    return ShardIndex.open(known), ""


def _evaluate(
    run: Run, index: ShardIndex, split: str, device: torch.device, batch_size: int
) -> tuple[Gallery, dict]:
    """Evaluates the run's best model on a split. Returns the gallery and the numbers of the evaluation."""
    index.rows(split)
    folder = run.path / "best"
    model = load_model(folder).to(device)
    config = data_config_of(folder, model)
    embedded = embed_split(model, index, split, config=config, batch_size=batch_size)
    numbers = evaluate_embeddings(embedded, index, split).to_dict()
    # Shows the captions that the run's stage aligns, because a model of stage 1 has only learned dense captions.
    return make_gallery(index, split, embedded, kind=run.aligned), numbers


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, or 2 after one line that names the user's mistake."""
    parser = command.Parser(
        prog="python -m d2s.report", description="Write RUN/report.html: curves, recall, pictures, settings."
    )
    add = parser.add_argument
    add("runs", type=user_path, nargs="+", metavar="RUN", help="run folder; more to compare with")
    add("--data", type=user_path, help="data set for the pictures (default: the run's own)")
    add("--split", default="val", help="split of the pictures (default: val)")
    add("--device", default="", help="cpu, cuda, cuda:1 ... (default: cuda if there)")
    add("--batch-size", type=positive, default=128, help="images or captions at a time (128)")
    add(
        "--picture",
        type=user_path,
        metavar="FILE.svg",
        help="also draw curves and a few queries into one file",
    )
    options = vars(parser.parse_args(argv))
    return command.run(lambda: _report(options.pop("runs"), **options))


def _report(folders: Sequence[Path], *, picture: Path | None, **options: Any) -> None:
    """Writes the report and the picture, and prints the recall table. Raises ValueError as `write_report` does."""
    runs = [read_run(folder) for folder in folders]
    target = write_report(runs, picture=picture, **options)
    rows = [
        (f"{row.run}: {row.split}, {row.captions}", row.retrieval)
        for run in runs
        for row in run.recall_rows()
    ]
    console = Console() if sys.stdout.isatty() else Console(width=130)
    if rows:
        console.print(recall_table(rows, chance=False))
    print(f"{target} ({target.stat().st_size / 1e6:.1f} MB)")
    if picture:
        print(picture)
