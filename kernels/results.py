"""`python -m d2s.kernels.results`: makes tables and plots of `kernels/README.md` from the CSV files in `results/`.

If a measurement was repeated, the last row counts. With `--check` the command writes nothing. It then fails if the
README or a plot is out of date. Without matplotlib, plots are neither written nor checked.
"""

import io
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from d2s.common.command import Parser, run, user_path
from d2s.common.files import write_text
from d2s.kernels.bench.cases import CASES
from d2s.kernels.bench.providers import PROVIDERS
from d2s.kernels.bench.record import RESULTS, Row, by_device, file_of
from d2s.kernels.problems import Shape

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- results: generated, see above -->", "<!-- end of results -->"
# Cases that are measured for several values of N. These cases get plots.
SWEEPS = tuple(name for name, case in CASES.items() if case.flops[0])
COLUMNS = 3  # number of panels side by side in a plot
# Settings of matplotlib. Text is stored as text. A constant salt makes plots of equal data equal files.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "d2s", "font.size": 8, "lines.markersize": 3}

# Maps the name of each line of a plot to its points (x, y). All coordinates are above 0.
Lines = Mapping[str, Sequence[tuple[float, float]]]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> list[str]:
    """Returns a Markdown table as lines. Each op, type and size has a row with times of forward and backward."""
    groups: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row.mode == "full":
            groups[row.case, row.dtype, row.n, row.tokens, row.width, row.timing][row.provider] = row
    others = [name for name in PROVIDERS[1:] if any(name in group for group in groups.values())]
    head = ["op", "size", "type", "floor ms", "ours ms", "x floor", *(f"{name} ms" for name in others)]
    head += ["eager / ours", "ours MiB", "eager MiB"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (case, dtype, n, tokens, width, clock), group in groups.items():
        ours, eager = group.get("ours"), group.get("eager")
        if ours is None:
            continue
        size = str(Shape(n=n, tokens=tokens, width=width)) + (" (graph)" if clock == "graph" else "")
        cells = [case, size, dtype, _number(ours.floor_ms), _number(ours.median_ms)]
        cells.append(f"{ours.median_ms / ours.floor_ms:.1f}")
        cells += [_number(group[name].median_ms) if name in group else "" for name in others]
        cells.append(f"{eager.median_ms / ours.median_ms:.1f}" if eager else "")
        cells += [_number(ours.extra_mib), _number(eager.extra_mib if eager else None)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def section(devices: dict[str, list[Row]]) -> str:
    """Returns the text to put between the two markers in the README. devices: measurements by device name."""
    parts: list[str] = []
    for device, rows in devices.items():
        last = rows[-1]
        rates = {row.dtype: f"{row.matmul_tflops:.3g} TFLOP/s ({row.dtype})" for row in rows}
        parts += [f"### {device}", ""]
        parts.append(f"torch {last.torch}, triton {last.triton or 'none'}, {last.date}; matrix product")
        parts.append(
            f"{', '.join(rates.values())}, copy {last.copy_gbs:.3g} GB/s, both measured in the same run."
        )
        parts += ["Forward + backward.", "", *table(rows), ""]
        for what in ("time", "memory"):
            if panels(rows, what):
                parts += [f"![{what} by N](results/{plot_name(device, what)})", ""]
    return "\n".join(parts).strip()


def plot_name(device: str, what: str) -> str:
    """Returns the file name of a plot for a device. what: "time" or "memory"."""
    return f"{file_of(Path(), device).stem}-{what}.svg"


def panels(rows: Sequence[Row], what: str) -> dict[str, Lines]:
    """Returns the panels of a plot by heading, one for each op and type. what: "time" or "memory"."""
    found = {}
    for case, dtype in product(SWEEPS, dict.fromkeys(row.dtype for row in rows)):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in sorted(rows, key=lambda row: (PROVIDERS.index(row.provider), row.n)):
            value = row.median_ms if what == "time" else row.extra_mib
            if (
                (row.case, row.dtype, row.mode) != (case, dtype, "full")
                or row.timing == "graph"
                or value is None
            ):
                continue
            lines.setdefault(row.provider, []).append((row.n, max(value, 1e-3)))
            if what == "time" and row.provider == "ours":
                lines.setdefault("floor", []).append((row.n, row.floor_ms))
        if lines:
            found[f"{case}, {dtype}"] = lines
    return found


def figure(title: str, panels: Mapping[str, Lines]) -> str:
    """Draws a plot with matplotlib and returns its SVG text.

    Three panels stand side by side. The axes are logarithmic. All panels share one legend, and a line has the
    same colour in all panels. The line "floor" is dashed and black.
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


def plots(devices: dict[str, list[Row]]) -> dict[str, str]:
    """Returns the SVG text of each plot by file name. devices: measurements by device name."""
    return {
        plot_name(device, what): figure(f"{device}: {what} of forward + backward in {unit}, by N", found)
        for device, rows in devices.items()
        for what, unit in (("time", "ms"), ("memory", "MiB"))
        if (found := panels(rows, what))
    }


def new_readme(path: Path, devices: dict[str, list[Row]]) -> str:
    """Returns the README's text with a new section between its markers. Raises ValueError for wrong markers."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path}: must have the line {BEGIN} once and below it the line {END} once")
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{head}{BEGIN}\n\n{section(devices)}\n\n{END}{tail}"


def update(folder: Path, readme: Path, check: bool) -> list[Path]:
    """Finds the README and plots that are out of date, and writes them unless `check`. Returns their paths."""
    devices = by_device(folder)
    files = {readme: new_readme(readme, devices)}
    if find_spec("matplotlib"):
        files |= {folder / name: svg for name, svg in plots(devices).items()}
    else:
        print(
            "results: matplotlib is not installed (extra `bench`): the plots stay as they are",
            file=sys.stderr,
        )
    stale = [path for path, text in files.items() if not path.exists() or path.read_bytes() != text.encode()]
    for path in stale:
        if not check:
            write_text(path, files[path])
        print(f"{'differs' if check else 'written'}: {path}")
    return stale


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 if --check finds a file out of date, or 2 for a user's mistake."""
    parser = Parser(prog="python -m d2s.kernels.results", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    parser.add_argument("--folder", type=user_path, default=RESULTS, help="where the CSV files and plots are")
    parser.add_argument("--readme", type=user_path, default=README)
    arguments, stale = parser.parse_args(argv), []
    code = run(lambda: stale.extend(update(arguments.folder, arguments.readme, arguments.check)))
    return code or int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
