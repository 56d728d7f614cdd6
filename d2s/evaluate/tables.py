"""Formats recall and capacity as tables for the screen, with the library rich."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from d2s.evaluate.metrics import KS, Recall, Retrieval

KINDS = ("images", "sparse", "dense")
CAPACITY = {
    "effective_rank": ("effective rank", "higher: more directions used"),
    "alignment": ("alignment", "lower: an image lies nearer to its captions"),
    "uniformity": ("uniformity", "lower: more evenly spread"),
    "modality_gap": ("modality gap", "lower: images and captions lie nearer"),
    "cosine": ("cosine sparse to dense", "higher: sparse captions lie nearer to the dense ones"),
}


def recall_table(rows: Sequence[tuple[str, Retrieval | None]], title: str = "", chance: bool = True) -> Table:
    """Returns a table with a row for each pair (name, retrieval). A retrieval of None adds a ruled line.

    i->t means image -> text, and t->i means text -> image. If `chance`, rates of a random order are added.
    """
    table = Table(title=title or None, title_justify="left", header_style="bold")
    table.add_column("", no_wrap=True)
    for way in ("i->t", "t->i"):
        for k in KS:
            table.add_column(f"{way}\nR@{k}", justify="right", no_wrap=True)
        table.add_column("median\nrank", justify="right")
    table.add_column("\nrSum", justify="right", style="bold")
    for name, retrieval in rows:
        if retrieval is None:
            table.add_section()
            continue
        table.add_row(name, *_cells(retrieval.i2t), *_cells(retrieval.t2i), f"{retrieval.rsum:.1f}")
        if chance:
            cells = [f"{value:.1f}" for value in retrieval.i2t.chance]
            back = [f"{value:.1f}" for value in retrieval.t2i.chance]
            table.add_row("  chance", *cells, "", *back, "", f"{retrieval.chance_rsum:.1f}", style="dim")
    return table


def _cells(recall: Recall) -> list[str]:
    return [*(f"{value:.1f}" for value in recall.hits), f"{recall.median_rank:g}"]


def capacity_table(measures: dict[str, float]) -> Table:
    """Returns a table of the measures that `d2s.evaluate.capacity.measure_capacity` computed."""
    table = Table(title="information capacity", title_justify="left", header_style="bold")
    table.add_column("")
    for column in KINDS:
        table.add_column(column, justify="right")
    table.add_column("")
    for key, (name, meaning) in CAPACITY.items():
        columns = ["", "cosine_sparse_dense", ""] if key == "cosine" else [f"{key}_{kind}" for kind in KINDS]
        values = [f"{measures[column]:.3f}" if column in measures else "" for column in columns]
        if any(values):
            table.add_row(name, *values, Text(meaning, style="dim"))
    return table
