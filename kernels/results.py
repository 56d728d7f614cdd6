"""`python -m d2s.kernels.results`: the tables and plots of the kernels' README, from the CSV files in `results/`.

Of measurements of the same thing the last row counts. `--check` writes nothing and fails where README or plots say
something else than the files. Where anything is wrong with a file, nothing is written.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from d2s.kernels.bench.cases import CASES, Shape
from d2s.kernels.bench.floor import work
from d2s.kernels.bench.measured import by_device
from d2s.kernels.bench.plot import Line, Panel, figure
from d2s.kernels.bench.providers import PROVIDERS
from d2s.kernels.bench.record import RESULTS, Row, file_of
from d2s.kernels.files import write_all

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- results: generated, see above -->", "<!-- end of results -->"
# The ceilings that the floors of a GPU nobody has measured are worked out with: TFLOP/s in bf16, GB/s.
H200 = (790.0, 4300.0)
SWEEPS = tuple(name for name, case in CASES.items() if case.flops[0])


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> list[str]:
    """Forward and backward of every op, type and size that was measured with eager: a line each."""
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


def unmeasured() -> list[str]:
    """The floors of a GPU at hand for nobody yet, by arithmetic."""
    lines = [
        "### GPU: not measured, no GPU was at hand",
        "",
        f"Floors at {H200[0]:,.0f} TFLOP/s in bf16 and {H200[1] / 1e3} TB/s (an H200's ceilings as reported",
        "elsewhere), forward + backward, by arithmetic alone:",
        "",
        "| op | size | floor ms | measured |",
        "|---|---|---|---|",
    ]
    for case in CASES:
        n = 32768
        shape = Shape(n=128, tokens=577, width=512) if case == "gpo" else Shape(n=n, width=512)
        floor = work(case, shape, torch.bfloat16, "full").floor_ms(*H200)
        lines.append(f"| {case} | {shape} | {floor:.3g} | not measured |")
    return lines


def section(devices: dict[str, list[Row]]) -> str:
    """What stands between the two markers."""
    parts: list[str] = []
    for device, rows in devices.items():
        last = rows[-1]
        parts += [f"### {device}", ""]
        parts.append(f"torch {last.torch}, triton {last.triton or 'none'}, {last.date}; matrix product")
        parts.append(f"{_ceilings(rows)}. Forward + backward.")
        parts += ["", *table(rows), ""]
        for what in ("time", "memory"):
            name = file_of(Path(), device).stem
            if any(_panels(rows, what)):
                parts += [f"![{what} by N](results/{name}-{what}.svg)", ""]
    if not any(device.startswith("NVIDIA") for device in devices):
        parts += unmeasured()
    return "\n".join(parts).strip()


def _ceilings(rows: Sequence[Row]) -> str:
    last = {row.dtype: row for row in rows}
    products = ", ".join(f"{row.matmul_tflops:.3g} TFLOP/s ({dtype})" for dtype, row in last.items())
    return f"{products}, copy {rows[-1].copy_gbs:.3g} GB/s, both measured in the same run"


def _panels(rows: Sequence[Row], what: str) -> list[Panel]:
    """One panel an op and type: a line a provider over N, and the floor."""
    panels = []
    for case in SWEEPS:
        for dtype in dict.fromkeys(row.dtype for row in rows):
            some = [
                r for r in rows if (r.case, r.dtype, r.mode) == (case, dtype, "full") and r.timing != "graph"
            ]
            lines = []
            for name in PROVIDERS:
                mine = [r for r in some if r.provider == name]
                points = [(r.n, r.median_ms if what == "time" else r.extra_mib) for r in mine]
                points = sorted((n, max(y, 1e-3)) for n, y in points if y is not None)
                lines += [Line(name=name, points=points)] if points else []
            if what == "time" and lines:
                floors = sorted({(r.n, r.floor_ms) for r in some if r.provider == "ours"})
                lines += [Line(name="floor", points=floors, dashed=True)] if floors else []
            if lines:
                panels.append(Panel(title=f"{case}, {dtype}", lines=lines))
    return panels


def plots(devices: dict[str, list[Row]]) -> dict[str, str]:
    """SVG text by file name."""
    made = {}
    for device, rows in devices.items():
        for what, unit in (("time", "ms"), ("memory", "MiB")):
            panels = _panels(rows, what)
            if panels:
                title = f"{device}: {what} of forward + backward in {unit}, by N"
                made[f"{file_of(Path(), device).stem}-{what}.svg"] = figure(title, panels)
    return made


def new_readme(path: Path, devices: dict[str, list[Row]]) -> str:
    """The README with what the files say between its markers. Raises ValueError where it lacks them."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    for marker in (BEGIN, END):
        if marker not in text:
            raise ValueError(f"{path}: lacks the line {marker}")
        # Of two pairs nobody knows which is the generated part.
        if text.count(marker) > 1:
            raise ValueError(f"{path}: has the line {marker} more than once")
    head, _, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise ValueError(f"{path}, line {head.count(chr(10)) + 1}: {BEGIN} must come before {END}")
    return f"{head}{BEGIN}\n\n{section(devices)}\n\n{END}{tail}"


def _stale(files: dict[Path, str]) -> dict[Path, str]:
    """Those that are missing or say something else. Raises OSError where one cannot be read."""
    # Whatever is no text in what lies there is a difference, not an error.
    return {
        path: text
        for path, text in files.items()
        if not path.exists() or path.read_text(encoding="utf-8", errors="surrogateescape") != text
    }


def main(argv: list[str] | None = None) -> int:
    """Writes README and plots, or compares them; 1 where they differ, 2 where a file cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m d2s.kernels.results", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where something would change")
    parser.add_argument(
        "--folder", type=Path, default=RESULTS, help="where the CSV files lie and the plots go"
    )
    parser.add_argument("--readme", type=Path, default=README)
    arguments = parser.parse_args(argv)
    try:
        devices = by_device(arguments.folder)
        files = {arguments.readme: new_readme(arguments.readme, devices)}
        files |= {arguments.folder / name: svg for name, svg in plots(devices).items()}
        stale = _stale(files)
        if not arguments.check:
            write_all(stale)
    except (OSError, ValueError) as error:
        print(f"results: {error}", file=sys.stderr)
        return 2
    for path in stale:
        print(f"{'differs' if arguments.check else 'written'}: {path}")
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
