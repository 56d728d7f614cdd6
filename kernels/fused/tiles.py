"""Chooses a kernel's tile by device capability, width and type, from the committed table `tiles.json`.

`d2s.kernels.tune` measures tiles on a device and writes the table. Kernels without an entry use the defaults
below. Tiles are not timed during training. Else workers could choose different tiles and add in other orders.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from d2s.common.files import read_json

TABLE = Path(__file__).with_name("tiles.json")
# The largest width in each bucket. Wider embeddings than 1152 use the last bucket.
BUCKETS = (64, 128, 256, 512, 1152)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Holds a program's sizes. It computes rows x columns similarities and loads `depth` channels at once."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth}/w{self.warps}s{self.stages}"


# Devices with at least 163 KiB of shared memory per block. Others may have only 99 KiB.
LARGE = ((8, 0), (9, 0), (10, 0), (10, 3))
# Used in the interpreter, in which an operation takes about the same time for every tile size.
INTERPRETED = Tile(rows=64, columns=64, depth=64, warps=4, stages=1)


def bucket(width: int) -> int:
    """Returns the largest width in the bucket of `width`."""
    return next((b for b in BUCKETS if width <= b), BUCKETS[-1])


@cache
def tuned_tiles() -> dict[str, Tile]:
    """Returns the committed table, which maps the keys of `entry` to tiles. The tuner adds candidates to it.

    Raises ValueError for a damaged table. If this worker used defaults instead, it would add its sums in
    another order than the other workers.
    """
    if not TABLE.exists():
        return {}
    try:
        return {key: Tile(**tile) for key, tile in read_json(TABLE).items()}
    except (AttributeError, TypeError, ValueError) as error:
        remedy = "restore it with git, or delete it and run `python -m d2s.kernels.tune`"
        raise ValueError(f"{TABLE}: {str(error).removeprefix(f'{TABLE}: ')}; {remedy}") from error


def _sweep_tile(width: int, half: bool, capability: tuple[int, int]) -> Tile:
    """Returns the tile for a sweep over all columns. The rows stay in shared memory if they fit."""
    if not half:
        return Tile(rows=64, columns=64, depth=16, warps=4, stages=2)
    depth = max(64, 1 << (width - 1).bit_length())
    if depth <= 128 or (depth == 256 and capability in LARGE):
        return Tile(rows=128, columns=64, depth=depth, warps=8, stages=3)
    # On sm_80, a tile of this depth spills registers.
    if depth == 512 and capability in LARGE[1:]:
        return Tile(rows=128, columns=32, depth=512, warps=8, stages=3)
    return Tile(rows=128, columns=64, depth=64, warps=8, stages=3)


def _contrastive_tile(kernel: str, width: int, half: bool, capability: tuple[int, int]) -> Tile | None:
    """Returns the default tile of a contrastive kernel, chosen by register use. None for other kernels."""
    if kernel in ("hinge_max_sweep", "info_nce_sweep"):
        return _sweep_tile(width, half, capability)
    if kernel == "hinge_gather":
        return Tile(rows=1, columns=128, depth=32, warps=4, stages=3)
    if kernel in ("positives", "hinge_few") or kernel.endswith("_pairs"):
        if not half:
            return Tile(rows=64, columns=64, depth=32, warps=4, stages=2)
        if kernel in ("positives", "hinge_few"):
            return Tile(rows=64, columns=64, depth=64, warps=8 if kernel == "hinge_few" else 4, stages=3)
        # 128 columns spill registers on other devices, in the sigmoid kernel and for small D.
        wide = capability == (9, 0) and kernel != "sigmoid_pairs" and width > 64
        return Tile(rows=128, columns=128 if wide else 64, depth=64, warps=8, stages=3)
    if kernel.startswith("products"):
        if not half:
            return Tile(rows=64, columns=64, depth=16, warps=4, stages=2)
        # 256 columns spill registers everywhere, 128 on sm_80 if D is large.
        most = 64 if capability == (8, 0) and width > 512 else 128
        columns = min(most, max(64, 1 << (width - 1).bit_length()))
        return Tile(rows=128, columns=columns, depth=64, warps=8, stages=3)
    return None


def default_tile(kernel: str, width: int, half: bool, capability: tuple[int, int] = (8, 0)) -> Tile:
    """Returns the tile of a kernel that is not in the table. `half`: the embeddings have 16 bits."""
    if found := _contrastive_tile(kernel, width, half, capability):
        return found
    if kernel == "gpo_forward":
        # One warp, with as many entries as fit into its registers.
        return Tile(rows=1024, columns=1, depth=1, warps=1, stages=1)
    if kernel.startswith("ranks"):
        # The 64-bit ids of the columns take registers in addition to the tile.
        return Tile(rows=64, columns=64, depth=64 if half else 32, warps=8, stages=3)
    if kernel.startswith("relational") and half:
        # A program holds two tiles at a time. Larger tiles spill registers before sm_100.
        return Tile(rows=128, columns=64, depth=64, warps=8, stages=2)
    if half:
        return Tile(rows=128, columns=128, depth=64, warps=8, stages=3)
    return Tile(rows=64, columns=64, depth=32, warps=4, stages=2)


def entry(kernel: str, capability: tuple[int, int], width: int, half: bool) -> str:
    """Returns the key in `tiles.json` of a kernel's tile, such as "positives/sm_90/512/half"."""
    return f"{kernel}/sm_{capability[0]}{capability[1]}/{bucket(width)}/{'half' if half else 'float'}"


def tile_for(kernel: str, x: torch.Tensor) -> Tile:
    """Returns the tile that `kernel` uses for embeddings with the device, type and width of x."""
    if x.device.type != "cuda":
        return INTERPRETED
    half, width = x.element_size() == 2, x.shape[1]
    capability = torch.cuda.get_device_capability(x.device)
    tuned = tuned_tiles().get(entry(kernel, capability, width, half))
    return tuned or default_tile(kernel, width, half, capability)
