"""Line plots over logarithmic axes as SVG text, by matplotlib."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

COLUMNS = 3
# Text stays text, and equal data give equal bytes.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "d2s", "font.size": 8, "lines.markersize": 3}


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points (x, y) in the order of x, both above 0."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines over common axes."""

    title: str
    lines: Sequence[Line]


def figure(title: str, panels: Sequence[Panel]) -> str:
    """The panels, three a row, under a title and one legend. The same line has the same colour in all panels."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / COLUMNS)
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(9, 0.6 + 2.2 * rows), layout="constrained")
        drawing.suptitle(title)
        handles = {}
        for number, panel in enumerate(panels, 1):
            axes = drawing.add_subplot(rows, COLUMNS, number, xscale="log", yscale="log", title=panel.title)
            axes.grid(color="#ddd")
            for line in panel.lines:
                style, colour = "--o" if line.dashed else "-o", f"C{names.index(line.name)}"
                (handles[line.name],) = axes.plot(*zip(*line.points, strict=True), style, color=colour)
        drawing.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(names))
        file = io.StringIO()
        drawing.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
