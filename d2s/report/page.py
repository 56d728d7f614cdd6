"""Renders the report and the SVG picture from the templates in this folder. The templates escape all text."""

import math
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from d2s.evaluate.metrics import KS
from d2s.evaluate.tables import CAPACITY
from d2s.report.charts import COLOURS, Chart, Series, histogram, line_chart, short
from d2s.report.gallery import TOP, Gallery
from d2s.report.runs import RecallRow, Run


def render_page(
    runs: Sequence[Run],
    rows: Sequence[RecallRow],
    *,
    gallery: Gallery | None,
    gallery_source: str,
    capacity: dict[str, float],
    no_gallery: str,
) -> str:
    """Returns the HTML of the report on the first of `runs`. The other runs are shown for comparison.

    Args:
        rows: the rows of the recall table.
        gallery_source: a phrase that names the split and the model of the pictures.
        capacity: maps each measure of information capacity to its value, from `d2s.evaluate`. Empty shows none.
        no_gallery: if `gallery` is None, the reason that is shown instead of the pictures.
    """
    return _environment().get_template("page.html").render(
        run=runs[0],
        runs=runs,
        rows=rows,
        tiles=_tiles(runs[0], rows),
        run_names=_legend(runs),
        curves=curves(runs),
        gallery=gallery,
        gallery_source=gallery_source,
        no_gallery=no_gallery,
        similarities=_similarities(gallery) if gallery else [],
        capacity=capacity,
    )  # fmt: skip


def render_picture(runs: Sequence[Run], gallery: Gallery | None) -> str:
    """Returns an SVG picture for a README. It shows loss, validation rSum, and text-to-image results by outcome.

    Raises:
        ValueError: no run has a row of metrics yet.
    """
    shown = [chart for chart in curves(runs) if chart.title in ("Loss", "Validation rSum")]
    if not shown:
        raise ValueError(f"{runs[0].path}: metrics.jsonl has no rows yet, so there is nothing to draw")
    by_outcome = {query.outcome: query for query in gallery.t2i.queries} if gallery else {}
    return _environment().get_template("picture.svg").render(
        curves=shown,
        run_names=_legend(runs),
        queries=list(by_outcome.values()),
        thumbnails=gallery.thumbnails if gallery else {},
        label=" and ".join(chart.title for chart in shown) + " over the epochs",
    )  # fmt: skip


def curves(runs: Sequence[Run]) -> list[Chart]:
    """Returns the charts over epochs. A chart is left out if no run has numbers for it."""
    epochs = [row["epoch"] for run in runs for row in run.rows]

    def chart(title: str, note: str, points: list, *, from_zero: bool = True, **style: bool) -> Chart | None:
        series = [
            Series(name=name, colour=colour, points=each, **style)
            for (name, colour), each in zip(_legend(runs), points, strict=True)
        ]
        x_max = max(epochs, default=0.0)
        return line_chart(series, title, note, x_label="epoch", x_max=x_max, from_zero=from_zero)

    def logged(field: str) -> list:
        return [run.points(field) for run in runs]

    loss_note = "total of a step; faint: as logged, line: mean over a window"
    validations = [run.validations() for run in runs]
    found = [
        chart("Loss", loss_note, logged("loss"), smooth=True, from_zero=False),
        chart("Learning rate", "of the heads", logged("lr")),
        chart("Validation rSum", "of the captions that the stage aligns", validations, dots=True),
        chart("Speed", "training samples a second", logged("samples_per_s"), smooth=True),
        chart("Gradient norm", "before clipping", logged("grad_norm"), smooth=True),
        chart("Distillation loss", "mean over the batch", logged("distill"), smooth=True, from_zero=False),
    ]
    return [each for each in found if each]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("d2s.report"), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {"number": _number, "short": short, "breaking": _breaking}
    environment.globals |= {"TOP": TOP, "CHART": Chart, "KS": KS, "CAPACITY": CAPACITY}
    return environment


def _number(value: float, form: str = ".1f") -> str:
    return "-" if math.isnan(value) else format(value, form)


def _breaking(text: str, mark: str) -> Markup:
    """Escapes `text` for HTML, and allows a line break after each `mark` in `text`."""
    return Markup(f"{mark}<wbr>").join(text.split(mark))


def _legend(runs: Sequence[Run]) -> list[tuple[str, int]]:
    return [(run.name, number % COLOURS + 1) for number, run in enumerate(runs)]


def _tiles(run: Run, rows: Sequence[RecallRow]) -> list[tuple[str, str, str]]:
    """Returns (value, name, note) for each of the large figures at the top of the page."""
    scores = [
        (
            f"{row.retrieval.rsum:.1f}",
            f"rSum, {row.split}, {row.captions}",
            f"chance {_number(row.retrieval.chance_rsum)}",
        )
        for row in rows
        if row.run == run.name and row.captions == run.aligned
    ]
    return scores[:2] + run.facts()


def _similarities(gallery: Gallery) -> list[Chart | None]:
    return [
        histogram(
            [(direction.right, 1), (direction.wrong, 2)],
            title,
            f"the right answer wins in {direction.won:.1f} % of {len(direction.right):,} queries",
            x_label="cosine similarity",
        )
        for title, direction in (("Image to text", gallery.i2t), ("Text to image", gallery.t2i))
    ]
