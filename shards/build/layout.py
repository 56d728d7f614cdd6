"""How images are arranged in a data set: shuffled within their split and cut into shards, or left in their tars."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from d2s.shards.format.sample import split_rank

Tars = tuple[np.ndarray, list[str]]


@dataclass(frozen=True, kw_only=True)
class ShardSize:
    """How a split is cut: so many samples a shard, or shards of about so many bytes of source images."""

    samples: int | None = 1000
    bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the images are arranged: which go where, in what order, cut how."""

    shard_size: ShardSize = field(default_factory=ShardSize)
    seed: int = 0
    """of the order within each split"""
    holdout: dict[str, int] = field(default_factory=dict)
    """images taken from train, by the same shuffle, for splits that the source does not have"""
    in_place: Path | None = None
    """the folder of tars that stay as they are: a shard is a tar, the order is theirs"""


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar to write: positions start..stop of the plan's order."""

    name: str
    split: str
    start: int
    stop: int


def arrange(
    groups: dict[str, np.ndarray], shuffle: np.ndarray, sizes: np.ndarray, tars: Tars, layout: Layout
) -> tuple[list[Shard], dict[str, int], np.ndarray]:
    """Orders each split by the keyed hash and cuts it into shards; or takes order and shards of the tars.

    Args:
        groups: for each split the numbers of its images, int64, in source order.
        shuffle: uint64 (images,), the keyed hash of each; smaller comes first.
        sizes: int64 (images,), bytes of each image, -1 where unknown.
        tars: int32 (images,), the tar that each lies in, and the paths of the tars.

    Returns:
        The shards; images a split; and all images in their final order, int64.

    Raises:
        ValueError: an empty split, a holdout that is too large, sizes in bytes that are not known.
    """
    if not layout.in_place:
        groups = {name: rows[np.argsort(shuffle[rows], kind="stable")] for name, rows in groups.items()}
    _hold_out(groups, layout.holdout)
    shards: list[Shard] = []
    counts: dict[str, int] = {}
    parts: list[np.ndarray] = []
    start = 0
    for split in sorted(groups, key=split_rank):
        rows = groups[split]
        if not len(rows):
            raise ValueError(f"split {split!r} is empty: every one of its images was left out")
        if layout.in_place:
            shards += _in_tars(split, rows, tars, layout.in_place, start)
        else:
            shards += _cut(split, rows, sizes, layout.shard_size, start)
        counts[split] = len(rows)
        parts.append(rows)
        start += len(rows)
    return shards, counts, np.concatenate(parts)


def _hold_out(groups: dict[str, np.ndarray], holdout: dict[str, int]) -> None:
    for split, count in holdout.items():
        train = groups.get("train", np.empty(0, np.int64))
        if split in groups:
            raise ValueError(
                f"holdout: the source has a split {split!r} of its own; name another or leave it out"
            )
        if count >= len(train):
            raise ValueError(f"holdout: {split}={count} leaves nothing of the {len(train)} images in train")
        groups[split], groups["train"] = train[:count], train[count:]


def _in_tars(split: str, rows: np.ndarray, tars: Tars, root: Path, start: int) -> list[Shard]:
    numbers = tars[0][rows]
    cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(rows)]
    names = [Path(tars[1][numbers[cut]]).relative_to(root).as_posix() for cut in cuts[:-1]]
    return [
        Shard(name, split, start + a, start + b) for name, (a, b) in zip(names, pairwise(cuts), strict=True)
    ]


def _cut(split: str, rows: np.ndarray, sizes: np.ndarray, limit: ShardSize, start: int) -> list[Shard]:
    if limit.bytes is None:
        cuts = list(range(0, len(rows), limit.samples))
    else:
        if (sizes[rows] < 0).any():
            raise ValueError(
                "shard-size in bytes: this source's images have no size yet; give a number of samples"
            )
        filled, cuts = 0, [0]
        for position, size in enumerate(sizes[rows].tolist()):
            if position > cuts[-1] and filled + size > limit.bytes:
                cuts.append(position)
                filled = 0
            filled += size
    ends = [*cuts[1:], len(rows)]
    pairs = enumerate(zip(cuts, ends, strict=True))
    return [Shard(f"{split}/{number:05d}.tar", split, start + a, start + b) for number, (a, b) in pairs]
