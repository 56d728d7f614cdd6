"""The results: one row a measurement, appended to a CSV a device, never overwritten."""

import csv
import datetime
import errno
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant of one op at one size in one mode.

    timing: the host's clock, events, or replays of a CUDA graph. extra_mib: peak memory of forward and backward
    beyond the inputs and the gradients. tflops: by the useful count, 0 where the op multiplies no matrices.
    matmul_tflops, copy_gbs: this run's ceilings. floor_ms: the larger of useful work and least traffic over them.
    """

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
    timing: str
    repeats: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    extra_mib: float | None
    tflops: float
    matmul_tflops: float
    copy_gbs: float
    floor_ms: float

    @property
    def key(self) -> tuple[object, ...]:
        """What a later row of the same measurement shares with it."""
        return (
            self.device,
            self.case,
            self.mode,
            self.provider,
            self.dtype,
            self.n,
            self.tokens,
            self.width,
            self.timing,
        )


COLUMNS = [field.name for field in fields(Row)]


def device_name(device: str) -> str:
    """What the rows call the device: the GPU's name, or the processor's with the threads in use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    threads = torch.get_num_threads()
    return f"CPU {found[1].strip() if found else 'unknown'}, {threads} thread{'s' if threads > 1 else ''}"


def versions() -> dict[str, str]:
    """The installed torch and triton; triton is empty where there is none."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {"torch": torch.__version__, "triton": triton}


def today() -> str:
    """The date in UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def file_of(folder: Path, device: str) -> Path:
    """The CSV of a device."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.csv"


def ready(folder: Path, device: str) -> bool:
    """Whether the device's file is still to be made; makes its folder.

    Raises ValueError where the file cannot be added to as it is, OSError where nothing can be written.
    """
    path = file_of(folder, device)
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "no right to write here", str(folder))
        return True
    with path.open("r+", encoding="utf-8", newline="") as file:
        try:
            text = file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8; move it away") from error
    if next(csv.reader(text.splitlines()), []) != COLUMNS:
        raise ValueError(f"{path}: has other columns than {','.join(COLUMNS)}; move it away")
    if not text.endswith("\n"):
        raise ValueError(f"{path}: the last line is cut off; complete or remove it")
    return False


def append(folder: Path, rows: Iterable[Row]) -> None:
    """Adds rows to their device's file. Raises what `ready` raises."""
    for row in rows:
        path = file_of(folder, row.device)
        fresh = ready(folder, row.device)
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if fresh:
                writer.writerow(COLUMNS)
            writer.writerow([_text(value) for value in asdict(row).values()])


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
