"""Line plots over logarithmic axes as SVG text, by matplotlib."""

import io
import math
from collections.abc import Mapping, Sequence

COLUMNS = 3
# Text stays text, and equal data give equal bytes.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "d2s", "font.size": 8, "lines.markersize": 3}

# Points (x, y), all above 0, by the name of their line.
Lines = Mapping[str, Sequence[tuple[float, float]]]


def figure(title: str, panels: Mapping[str, Lines]) -> str:
    """The panels by their titles, three a row, with one legend. A line has the same colour in all panels.

    The line "floor" is dashed and black.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / COLUMNS)
    names = dict.fromkeys(name for lines in panels.values() for name in lines if name != "floor")
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(9, 0.6 + 2.2 * rows), layout="constrained")
        drawing.suptitle(title)
        handles = {}
        for number, (heading, lines) in enumerate(panels.items(), 1):
            axes = drawing.add_subplot(rows, COLUMNS, number, xscale="log", yscale="log", title=heading)
            axes.grid(color="#ddd")
            for name, points in lines.items():
                style = "--o" if name == "floor" else "-o"
                (handles[name],) = axes.plot(*zip(*points, strict=True), style, color=colours.get(name, "k"))
        drawing.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
        file = io.StringIO()
        drawing.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
