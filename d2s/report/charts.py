"""Charts as inline SVG, drawn here so that a report needs neither a library nor a network.

Colours are CSS variables of the page (`--s1` to `--s6` for series), so a chart follows light and dark.
"""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 34
SERIES_COLOURS = 6
_MOST_POINTS = 400


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart. x and y have the same length; points that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 1
    """1 to 6."""
    smooth: bool = False
    """Draw a moving average over the points, and the points themselves faintly."""
    marks: bool = False
    """A dot at each point: for few points that were measured one by one."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) between low and high, about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number for people: four digits, thousands separated, powers of ten where they are shorter."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{value:.4g}"


def average(values: np.ndarray) -> np.ndarray:
    """Mean over a window around each point, a twentieth of all wide, cut off at the ends: it does not lag."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    start, stop = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def line_chart(
    series: Sequence[Series], *, x_label: str, x_max: float = 0.0, from_zero: bool = False, label: str = ""
) -> str:
    """A line chart as SVG, its horizontal axis from 0; an empty string where there is nothing to draw.

    Args:
        x_max: let the horizontal axis reach so far at least.
        from_zero: let the vertical axis start at 0.
        label: what the chart shows, for screen readers.
    """
    lines = [(s, *_finite(s)) for s in series]
    lines = [(s, x, y) for s, x, y in lines if len(x)]
    if not lines:
        return ""
    xs, ys = np.concatenate([x for _, x, _ in lines]), np.concatenate([y for _, _, y in lines])
    scale = _Scale(
        min(0.0, xs.min()), max(xs.max(), x_max), min(0.0, ys.min()) if from_zero else ys.min(), ys.max()
    )
    parts = [scale.grid(x_label)]
    points = []
    for s, x, y in lines:
        colour = f"var(--s{s.colour})"
        if s.smooth and len(x) > 20:
            parts.append(_path(scale, x, y, f'stroke="{colour}" class="line faint"'))
            y = average(y)
        parts.append(_path(scale, x, y, f'stroke="{colour}" class="line"'))
        if s.marks and len(x) <= 60:
            parts += [f'<circle cx="{scale.x(a):.1f}" cy="{scale.y(b):.1f}" r="3" fill="{colour}"/>'
                      for a, b in zip(x, y, strict=True)]  # fmt: skip
        points.append(
            {
                "name": s.name,
                "colour": s.colour,
                "at": [
                    [round(scale.x(a), 1), round(scale.y(b), 1), short(a), short(b)]
                    for a, b in zip(x, y, strict=True)
                ],
            }
        )
    data = html.escape(json.dumps(points))
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}"'
        f' data-points="{data}">{"".join(parts)}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
    )


def histogram(groups: Sequence[tuple[str, np.ndarray, int]], *, bins: int = 48, label: str = "") -> str:
    """Overlaid histograms of (name, values, colour) over common bins; heights are shares of each group."""
    values = np.concatenate([v for _, v, _ in groups])
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return ""
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-6:
        low, high = low - 0.01, high + 0.01
    edges = np.linspace(low, high, bins + 1)
    shares = []
    for _, v, _ in groups:
        v = v[np.isfinite(v)]
        shares.append(100 * np.histogram(v, edges)[0] / max(len(v), 1))
    scale = _Scale(low, high, 0.0, max(float(s.max()) for s in shares) * 1.05)
    parts = [scale.grid("cosine similarity", suffix=" %")]
    for (_, v, colour), share in zip(groups, shares, strict=True):
        corners = [(edges[0], 0.0)]
        for i, height in enumerate(share):
            corners += [(edges[i], height), (edges[i + 1], height)]
        corners.append((edges[-1], 0.0))
        points = " ".join(f"{scale.x(a):.1f},{scale.y(b):.1f}" for a, b in corners)
        parts.append(
            f'<polygon points="{points}" class="area" fill="var(--s{colour})" stroke="var(--s{colour})"/>'
        )
        middle = scale.x(float(np.mean(v[np.isfinite(v)])))
        parts.append(f'<line class="mean" stroke="var(--s{colour})" x1="{middle:.1f}" x2="{middle:.1f}"'
                     f' y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')  # fmt: skip
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def legend(entries: Sequence[tuple[str, int]]) -> str:
    """Names with their colours; nothing for a single one."""
    if len(entries) < 2:
        return ""
    items = "".join(
        f'<span><i style="background:var(--s{c})"></i>{html.escape(n)}</span>' for n, c in entries
    )
    return f'<div class="legend">{items}</div>'


class _Scale:
    """From values to the drawing's units, and the axes."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float) -> None:
        # A single value or a flat line still needs an extent.
        if not x_high > x_low:
            x_low, x_high = x_low - 0.5, x_high + 0.5
        if not y_high > y_low:
            pad = abs(y_low) * 0.1
            y_low, y_high = (y_low - pad, y_high + pad) if pad else (0.0, 1.0)
        self.x_low, self.x_high, self.y_low, self.y_high = map(float, (x_low, x_high, y_low, y_high))

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def grid(self, x_label: str, suffix: str = "") -> str:
        parts = []
        for value in ticks(self.y_low, self.y_high):
            y = f"{self.y(value):.1f}"
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y}" dy="0.32em" text-anchor="end">'
                         f"{short(value)}{suffix}</text>")  # fmt: skip
        bottom = HEIGHT - BOTTOM
        for value in ticks(self.x_low, self.x_high, 6):
            x = f"{self.x(value):.1f}"
            parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
            parts.append(
                f'<text class="tick" x="{x}" y="{bottom + 16}" text-anchor="middle">{short(value)}</text>'
            )
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">'
                     f"{html.escape(x_label)}</text>")  # fmt: skip
        return "".join(parts)


def _finite(series: Series) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(x) > _MOST_POINTS:
        # Means of equal stretches: a line drawn from every tenth point would show noise as trend.
        parts = np.array_split(np.arange(len(x)), _MOST_POINTS)
        x, y = (np.array([values[part].mean() for part in parts]) for values in (x, y))
    return x, y


def _path(scale: _Scale, x: np.ndarray, y: np.ndarray, attributes: str) -> str:
    points = " L".join(f"{scale.x(a):.1f} {scale.y(b):.1f}" for a, b in zip(x, y, strict=True))
    return f'<path d="M{points}" {attributes}/>'
