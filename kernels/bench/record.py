"""Prints measurements, and appends them to CSV files, one for each device. Old rows are never changed."""

import csv
import datetime
import errno
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from d2s.kernels.problems import Shape

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True, kw_only=True)
class Row:
    """The measurement of one variant of one op at one size in one mode."""

    date: str
    device: str
    torch: str
    triton: str
    threads: int
    case: str
    mode: str
    provider: str
    dtype: str
    n: int
    tokens: int
    width: int
    timing: str  # "wall" (the host's clock), "events" (CUDA events) or "graph" (replays of a CUDA graph)
    repeats: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    extra_mib: float | None  # `timing.extra_bytes`, but in MiB; None if not measured
    tflops: float  # `cases.Work.flops` divided by the median time; 0 if the op multiplies no matrices
    matmul_tflops: float  # the device's rate for matrix products in this run
    copy_gbs: float  # the device's rate for copies in this run
    floor_ms: float  # the time of `cases.Work` at these two rates

    @property
    def key(self) -> tuple[object, ...]:
        """The fields that identify a measurement. If a measurement is repeated, the rows have equal keys."""
        size = self.n, self.tokens, self.width
        return self.device, self.case, self.mode, self.provider, self.dtype, size, self.timing


COLUMNS = [field.name for field in fields(Row)]
# The heading of the printed table.
HEADER = (
    f"{'case':10} {'mode':8} {'size':>11} {'provider':9} {'timing':6} {'median ms':>10} {'20 %':>9} {'80 %':>9}"
    f" {'extra MiB':>10} {'TFLOP/s':>8} {'of matmul':>9} {'of floor':>8} {'vs eager':>8} {'memory':>8}"
)


def device_name(device: str) -> str:
    """Returns the name of the GPU. For "cpu", returns the processor's name and the number of threads in use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    threads = torch.get_num_threads()
    return f"CPU {found[1].strip() if found else 'unknown'}, {threads} thread{'s' if threads > 1 else ''}"


def circumstances(device: str) -> dict[str, str | int]:
    """Returns the first five fields of `Row`. The date is in UTC. Without triton, its version is ""."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if find_spec("triton") else "",
        "threads": torch.get_num_threads(),
    }


def file_of(folder: Path, device: str) -> Path:
    """Returns the path of a device's CSV file."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.csv"


def check_writable(folder: Path, device: str) -> None:
    """Creates `folder`. Raises OSError or ValueError if `append` could not add rows to the device's CSV file."""
    path = file_of(folder, device)
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open("r+", encoding="utf-8", errors="replace") as file:
            if file.readline().rstrip("\n") != ",".join(COLUMNS):
                raise ValueError(f"{path}: has other columns than {','.join(COLUMNS)}; move it away")
    elif not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "no right to write here", str(folder))


def show(rows: list[Row]) -> None:
    """Prints the rows. "vs eager" and "memory" are the time and memory of "eager", divided by the row's values."""
    eager = {(r.mode, r.timing): r for r in rows if r.provider == "eager"}
    for r in rows:
        base = eager.get((r.mode, r.timing))
        faster = f"{base.median_ms / r.median_ms:7.1f}x" if base else ""
        both = base and base.extra_mib is not None and r.extra_mib is not None
        # Memory below 1 MiB counts as 1 MiB, because smaller differences are noise.
        less = f"{base.extra_mib / max(r.extra_mib, 1):7.1f}x" if both else ""
        memory = "" if r.extra_mib is None else f"{r.extra_mib:.1f}"
        size = Shape(n=r.n, tokens=r.tokens, width=r.width)
        rate = f"{r.tflops:8.3f} {100 * r.tflops / r.matmul_tflops:7.1f} %" if r.tflops else f"{'':18}"
        print(
            f"{r.case:10} {r.mode:8} {size!s:>11} {r.provider:9} {r.timing:6} {r.median_ms:10.3f}"
            f" {r.p20_ms:9.3f} {r.p80_ms:9.3f} {memory:>10} {rate} {r.median_ms / r.floor_ms:7.1f}x"
            f" {faster:>8} {less:>8}",
            flush=True,
        )
    for ours in (r for r in rows if r.provider == "ours"):
        others = [r for r in rows if (r.mode, r.timing) == (ours.mode, ours.timing) and r is not ours]
        if others:
            than = ", ".join(f"{r.median_ms / ours.median_ms:.1f}x as fast as {r.provider}" for r in others)
            print(f"  {ours.case} {ours.mode}: ours is {than}", flush=True)


def append(folder: Path, rows: Iterable[Row]) -> None:
    """Appends each row to the CSV file of its device."""
    for row in rows:
        path = file_of(folder, row.device)
        is_new = not path.exists()
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if is_new:
                writer.writerow(COLUMNS)
            writer.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in asdict(row).values()])


def read(path: Path) -> list[Row]:
    """Returns the rows of a CSV file. Raises ValueError, with file and line, if the file is damaged."""
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for cells in reader:
                # The type of extra_mib, float | None, cannot be called to convert a cell.
                values = {f.name: f.type(cells[f.name]) for f in fields(Row) if isinstance(f.type, type)}
                extra = float(cells["extra_mib"]) if cells["extra_mib"] else None
                rows.append(Row(**values, extra_mib=extra))
        except (csv.Error, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {type(error).__name__}: {error}") from error
    return rows


def by_device(folder: Path) -> dict[str, list[Row]]:
    """Returns all rows by device. Keeps the last row of a repeated measurement. Raises ValueError without rows."""
    latest = {row.key: row for path in sorted(folder.glob("*.csv")) for row in read(path)}
    if not latest:
        raise ValueError(f"{folder}: holds no measurement (no CSV file with rows)")
    found: dict[str, list[Row]] = defaultdict(list)
    for row in latest.values():
        found[row.device].append(row)
    return dict(sorted(found.items()))
