"""Lines over logarithmic axes as SVG, for the results: no more than they need."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 300, 220
LEFT, TOP, RIGHT, BOTTOM = 52, 28, 10, 30
COLUMNS = 3
COLOURS = ("#0b6e99", "#c4572b", "#3a8f4d", "#7a4fb5", "#b08900", "#c43d7a", "#555555", "#2a9d8f", "#8a8a8a")


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points (x, y), both above 0, by x."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines over common axes."""

    title: str
    lines: Sequence[Line]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The powers of ten around all values, at least one apart."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _power(exponent: int) -> str:
    return f"{10**exponent:,}" if exponent >= 0 else f"{10.0**exponent:g}"


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'


def _panel(panel: Panel, left: float, top: float, colours: dict[str, str]) -> list[str]:
    x_low, x_high = _span([x for line in panel.lines for x, _ in line.points])
    y_low, y_high = _span([y for line in panel.lines for _, y in line.points])
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_low) / (x_high - x_low)
        up = (math.log10(y) - y_low) / (y_high - y_low)
        return left + LEFT + across * wide, top + TOP + (1 - up) * high

    out = [_text(left + LEFT, top + TOP - 10, panel.title, 'font-weight="bold"')]
    for exponent in range(y_low, y_high + 1):
        x, y = at(10**x_low, 10**exponent)
        out.append(f'<path d="M{x:.1f} {y:.1f}h{wide}" stroke="#ddd"/>')
        out.append(_text(x - 6, y + 4, _power(exponent), 'text-anchor="end"'))
    for exponent in range(x_low, x_high + 1):
        x, y = at(10**exponent, 10**y_low)
        out.append(f'<path d="M{x:.1f} {y:.1f}v{-high}" stroke="#ddd"/>')
        out.append(_text(x, y + 16, _power(exponent), 'text-anchor="middle"'))
    for line in panel.lines:
        places = [at(x, y) for x, y in line.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        colour = colours[line.name]
        dash = ' stroke-dasharray="4 3"' if line.dashed else ""
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in places]
    return out


def figure(title: str, panels: Sequence[Panel]) -> str:
    """The panels, three a row, under a title and a legend."""
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    head = 48
    rows = math.ceil(len(panels) / COLUMNS)
    width, height = COLUMNS * WIDTH, head + rows * HEIGHT
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(10, 18, title, 'font-size="13" font-weight="bold"'),
    ]
    for i, name in enumerate(names):
        out.append(f'<rect x="{10 + 95 * i}" y="29" width="12" height="3" fill="{colours[name]}"/>')
        out.append(_text(26 + 95 * i, 35, name))
    for i, panel in enumerate(panels):
        row, column = divmod(i, COLUMNS)
        out += _panel(panel, column * WIDTH, head + row * HEIGHT, colours)
    return "\n".join([*out, "</svg>"]) + "\n"
