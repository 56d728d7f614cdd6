"""Computes the positions of lines, areas and marks in charts. templates/chart.svg draws them as SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

COLOURS = 6
_MOST_POINTS = 400


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y) of each point, in the order of the line. Points that are not finite are not drawn."""
    colour: int = 1
    """Number of the colour, 1 to COLOURS."""
    smooth: bool = False
    """Whether to draw a moving average, over a faint line through all points."""
    dots: bool = False
    """Whether to draw a dot at each point if the line has at most 60 points."""


@dataclass(kw_only=True)
class Chart:
    """A chart of `width` by `height` units. x grows to the right, and y grows downwards."""

    title: str
    note: str
    """Text below the title, which explains the lines or states the main figure."""
    x_label: str
    x_marks: list[tuple[float, str]]
    """(x, text) of each number under the horizontal axis."""
    y_marks: list[tuple[float, str]]
    """(y, text) of each number beside the vertical axis."""
    shapes: list[tuple[str, int, str]] = field(default_factory=list)
    """(kind, colour, points) of each shape. Kinds: "line", "faint", "area", "mean". Points: "x,y x,y ..."."""
    dots: list[tuple[float, float, int]] = field(default_factory=list)
    """(x, y, colour) of each dot."""
    readings: list[dict] = field(default_factory=list)
    """For each line: "name", "colour", and "at", a list of (x, y, x text, y text) to show at the pointer."""
    width, height = 520, 250
    left, right, top, bottom = 58, 506, 14, 216


class Axis:
    """An axis. It maps the values from `low` to `high` linearly to positions from `start` to `end` in the chart."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if not high > low:  # a single value still needs a range
            margin = abs(low) * 0.1 or 0.5
            low, high = low - margin, high + margin
        self.low, self.high, self.start, self.end = float(low), float(high), start, end

    def place(self, value: float) -> float:
        """Returns the position of a value in the chart's units, rounded to a tenth."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def marks(self, count: int, unit: str = "") -> list[tuple[float, str]]:
        """Returns (position, text) of about `count` round numbers on the axis. `unit` is appended to each text."""
        return [(self.place(value), short(value) + unit) for value in ticks(self.low, self.high, count)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` numbers in low..high, spaced by 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Formats a number for people, such as 1,234,567 or 12.34 or 1e-5."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{value:.4g}"


def average(values: np.ndarray) -> np.ndarray:
    """Returns the centred moving average of `values`. Both have shape (n,). The window has about n / 20 entries."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    start, stop = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def line_chart(
    series: Sequence[Series], title: str, note: str, *, x_label: str, x_max: float, from_zero: bool
) -> Chart | None:
    """Returns a line chart, or None if no series has a finite point. The horizontal axis starts at 0 or less.

    Args:
        x_max: the horizontal axis reaches at least this value.
        from_zero: whether the vertical axis contains 0.
    """
    lines = [(s, x, y) for s in series for x, y in [_finite(s)] if len(x)]
    if not lines:
        return None
    xs, ys = np.concatenate([x for _, x, _ in lines]), np.concatenate([y for _, _, y in lines])
    x_axis = Axis(min(0.0, xs.min()), max(xs.max(), x_max), Chart.left, Chart.right)
    y_axis = Axis(min(0.0, ys.min()) if from_zero else ys.min(), ys.max(), Chart.bottom, Chart.top)
    marks = {"x_marks": x_axis.marks(6), "y_marks": y_axis.marks(5)}
    chart = Chart(title=title, note=note, x_label=x_label, **marks)
    for s, x, y in lines:
        places = [x_axis.place(value) for value in x]
        if s.smooth and len(x) > 20:
            chart.shapes.append(("faint", s.colour, _points(places, map(y_axis.place, y))))
            y = average(y)
        heights = [y_axis.place(value) for value in y]
        chart.shapes.append(("line", s.colour, _points(places, heights)))
        if s.dots and len(x) <= 60:
            chart.dots += [(x, y, s.colour) for x, y in zip(places, heights, strict=True)]
        at = list(zip(places, heights, map(short, x), map(short, y), strict=True))
        chart.readings.append({"name": s.name, "colour": s.colour, "at": at})
    return chart


def histogram(
    groups: Sequence[tuple[np.ndarray, int]], title: str, note: str, *, x_label: str, bins: int = 48
) -> Chart | None:
    """Returns overlaid histograms of `groups`, or None if no group has a finite value.

    groups: (values, colour) of each group. Bars show percentages of a group. A dashed line marks its mean.
    """
    groups = [(values[np.isfinite(values)], colour) for values, colour in groups]
    groups = [(values, colour) for values, colour in groups if len(values)]
    if not groups:
        return None
    low = min(float(values.min()) for values, _ in groups)
    high = max(float(values.max()) for values, _ in groups)
    if high - low < 1e-6:
        low, high = low - 0.01, high + 0.01
    edges = np.linspace(low, high, bins + 1)
    percents = [100 * np.histogram(values, edges)[0] / len(values) for values, _ in groups]
    x_axis = Axis(low, high, Chart.left, Chart.right)
    y_axis = Axis(0.0, 1.05 * max(float(p.max()) for p in percents), Chart.bottom, Chart.top)
    marks = {"x_marks": x_axis.marks(6), "y_marks": y_axis.marks(5, " %")}
    chart = Chart(title=title, note=note, x_label=x_label, **marks)
    corners = [x_axis.place(edge) for edge in np.repeat(edges, 2)]
    for (values, colour), percent in zip(groups, percents, strict=True):
        heights = [y_axis.place(value) for value in [0.0, *np.repeat(percent, 2), 0.0]]
        mean = x_axis.place(float(values.mean()))
        chart.shapes.append(("area", colour, _points(corners, heights)))
        chart.shapes.append(("mean", colour, _points([mean, mean], [Chart.top, Chart.bottom])))
    return chart


def _points(xs: Sequence[float], ys: Sequence[float]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))


def _finite(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Returns x and y of the series' finite points. If there are more than 400 points, averages them to 400."""
    x, y = np.asarray(series.points, float).reshape(-1, 2).T
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) > _MOST_POINTS:
        # Neighbours are averaged, because a line through every tenth point would show noise as a trend.
        parts = np.array_split(np.arange(len(x)), _MOST_POINTS)
        x, y = (np.array([values[part].mean() for part in parts]) for values in (x, y))
    return x, y
