"""The tile of each kernel: by device capability, width and type, from a committed table and never from a timer.

Workers that timed their own candidates would disagree, and with them the order of sums. `d2s.kernels.tune`
measures on the device at hand and writes `tiles.json`; what it holds no entry for takes the defaults below.
"""

import json
import re
import warnings
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("tiles.json")
# The largest width of each bucket; wider ones share the last.
BUCKETS = (64, 128, 256, 512, 1152)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """rows x columns of the similarity matrix a program holds, and how many entries of D it loads at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Devices with at least 163 KiB of shared memory a block; others may have 99.
LARGE = ((8, 0), (9, 0), (10, 0), (10, 3))
# For the interpreter, whose cost is per block operation.
INTERPRETED = Tile(rows=64, columns=64, depth=64, warps=4, stages=1)


def bucket(width: int) -> int:
    """The bucket of D."""
    return next((b for b in BUCKETS if width <= b), BUCKETS[-1])


@cache
def tuned_tiles() -> dict[str, dict[str, int]]:
    """The content of tiles.json, read once; the tuner puts its candidates into this very dictionary."""
    return read_tiles(TABLE)


def read_tiles(path: Path) -> dict[str, dict[str, int]]:
    """Tiles by entry; none where there is no such file. Warns of entries that no kernel asks for.

    Raises ValueError naming the file and the entry that is damaged: with the defaults in its place, this worker
    would add its sums up in another order than one whose file is whole.
    """
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ValueError("holds no table of tiles")
        for key, tile in table.items():
            if fault := _fault(tile):
                raise ValueError(f"{key}: {fault}")
    except (ValueError, RecursionError) as error:
        remedy = "restore it with git, or delete it and run `python -m d2s.kernels.tune`"
        raise ValueError(f"{path}: {error}; {remedy}") from error
    if unknown := [key for key in table if not _known(key)]:
        warnings.warn(f"{path}: no kernel asks for {', '.join(map(repr, unknown))}", stacklevel=2)
    return table


def _fault(tile: object) -> str:
    """What is wrong with an entry's tile, in words."""
    names = [field.name for field in fields(Tile)]
    if not isinstance(tile, dict) or {*tile} != {*names}:
        return f"must hold {', '.join(names)} and nothing else"
    for name, value in tile.items():
        # True is an int, too.
        if type(value) is not int or value < 1:
            return f"{name}: {value!r}: must be a whole number above 0"
        # Triton has blocks of no other sizes.
        if name != "stages" and value & (value - 1):
            return f"{name}: {value}: must be a power of two"
    return ""


def _known(key: str) -> bool:
    """Whether a kernel could ask for that entry."""
    # That module's kernels import this one.
    from d2s.kernels.fused import ALL_SPECS

    found = re.fullmatch(r"(\w+)/sm_\d{2,3}/(\d+)/(half|float)", key)
    if found is None:
        return False
    return found[1] in {spec.row or spec.name for spec in ALL_SPECS} and int(found[2]) in BUCKETS


def _sweep_tile(width: int, half: bool, capability: tuple[int, int]) -> Tile:
    """For sweeps over all columns: the rows stay in shared memory where they fit into it."""
    if not half:
        return Tile(rows=64, columns=64, depth=16, warps=4, stages=2)
    depth = max(64, 1 << (width - 1).bit_length())
    if depth <= 128 or (depth == 256 and capability in LARGE):
        return Tile(rows=128, columns=64, depth=depth, warps=8, stages=3)
    # On sm_80 a tile of that depth spills.
    if depth == 512 and capability in LARGE[1:]:
        return Tile(rows=128, columns=32, depth=512, warps=8, stages=3)
    return Tile(rows=128, columns=64, depth=64, warps=8, stages=3)


def _contrastive_tile(kernel: str, width: int, half: bool, capability: tuple[int, int]) -> Tile | None:
    """For the kernels of the contrastive losses; chosen by registers, spills and shared memory alone."""
    if kernel in ("hinge_max_sweep", "info_nce_sweep"):
        return _sweep_tile(width, half, capability)
    if kernel == "hinge_gather":
        return Tile(rows=1, columns=128, depth=32, warps=4, stages=3)
    if kernel in ("positives", "hinge_few") or kernel.endswith("_pairs"):
        if not half:
            return Tile(rows=64, columns=64, depth=32, warps=4, stages=2)
        if kernel in ("positives", "hinge_few"):
            return Tile(rows=64, columns=64, depth=64, warps=8 if kernel == "hinge_few" else 4, stages=3)
        # More columns spill on the others, and for small D.
        wide = capability == (9, 0) and kernel != "sigmoid_pairs" and width > 64
        return Tile(rows=128, columns=128 if wide else 64, depth=64, warps=8, stages=3)
    if kernel.startswith("products"):
        if not half:
            return Tile(rows=64, columns=64, depth=16, warps=4, stages=2)
        # 256 columns spill everywhere, 128 on sm_80 where D is large.
        most = 64 if capability == (8, 0) and width > 512 else 128
        columns = min(most, max(64, 1 << (width - 1).bit_length()))
        return Tile(rows=128, columns=columns, depth=64, warps=8, stages=3)
    return None


def default_tile(kernel: str, width: int, half: bool, capability: tuple[int, int] = (8, 0)) -> Tile:
    """What a kernel takes on a device nobody has tuned it for; half: embeddings of 16 bits."""
    if found := _contrastive_tile(kernel, width, half, capability):
        return found
    if kernel == "gpo_forward":
        # One warp, with what fits in its registers.
        return Tile(rows=1024, columns=1, depth=1, warps=1, stages=1)
    if kernel.startswith("ranks"):
        # The columns' ids, 64 bits each, lie beside the tile.
        return Tile(rows=64, columns=64, depth=64 if half else 32, warps=8, stages=3)
    if kernel.startswith("relational") and half:
        # Two tiles at a time; larger ones spill before sm_100.
        return Tile(rows=128, columns=64, depth=64, warps=8, stages=2)
    if half:
        return Tile(rows=128, columns=128, depth=64, warps=8, stages=3)
    return Tile(rows=64, columns=64, depth=32, warps=4, stages=2)


def entry(kernel: str, capability: tuple[int, int], width: int, half: bool) -> str:
    """The table's key."""
    return f"{kernel}/sm_{capability[0]}{capability[1]}/{bucket(width)}/{'half' if half else 'float'}"


def tile_for(kernel: str, x: torch.Tensor) -> Tile:
    """The tile of a kernel over embeddings like x (n, D)."""
    if x.device.type != "cuda":
        return INTERPRETED
    half, width = x.element_size() == 2, x.shape[1]
    capability = torch.cuda.get_device_capability(x.device)
    tuned = tuned_tiles().get(entry(kernel, capability, width, half))
    return Tile(**tuned) if tuned else default_tile(kernel, width, half, capability)
