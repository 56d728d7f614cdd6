"""How images are arranged: shuffled within their split and cut into shards, or left where they lie in tars."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from d2s.shards.format.keys import split_rank


@dataclass(frozen=True, kw_only=True)
class ShardSize:
    """Size of a shard: a number of samples, or, if `bytes` is set, about so many bytes of source images."""

    samples: int | None = 1000
    bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which images go where, in which order, in shards of which size."""

    shard_size: ShardSize = field(default_factory=ShardSize)
    seed: int = 0
    """seed of the order within each split"""
    holdout: dict[str, int] = field(default_factory=dict)
    """splits that the source does not have, and how many images of train go to each, by the same shuffle"""
    in_place: Path | None = None
    """folder of tars that stay as they are: each tar is a shard and keeps its order"""


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard: positions start..stop of the order of all images."""

    name: str
    split: str
    start: int
    stop: int


def arrange(
    groups: dict[str, np.ndarray],
    shuffle: np.ndarray,
    sizes: np.ndarray,
    tars: tuple[np.ndarray, list[str]],
    layout: Layout,
) -> tuple[list[Shard], dict[str, int], np.ndarray]:
    """Orders each split by the keyed hash and cuts it into shards; of tars in place, takes their order and shards.

    Args:
        groups: the numbers of the images in each split, int64, in source order.
        shuffle: uint64 (images,), the keyed hash of each image; the smallest comes first.
        sizes: int64 (images,), bytes of each image, -1 where unknown.
        tars: int32 (images,), the number of the tar of each image, and the paths of the tars.

    Returns:
        The shards; the number of images in each split; and all images in their final order, int64.

    Raises:
        ValueError: an empty split, a holdout that is too large, or a shard size in bytes of unknown images.
    """
    if not layout.in_place:
        groups = {name: rows[np.argsort(shuffle[rows], kind="stable")] for name, rows in groups.items()}
    _hold_out(groups, layout.holdout)
    shards: list[Shard] = []
    start = 0
    order = sorted(groups, key=split_rank)
    for split in order:
        rows = groups[split]
        if not len(rows):
            raise ValueError(f"split {split!r} is empty: every one of its images was left out")
        if layout.in_place:
            numbers = tars[0][rows]
            cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist()]
            names = [Path(tars[1][numbers[cut]]).relative_to(layout.in_place).as_posix() for cut in cuts]
        else:
            cuts = _cuts(rows, sizes, layout.shard_size)
            names = [f"{split}/{number:05d}.tar" for number in range(len(cuts))]
        ranges = pairwise([*cuts, len(rows)])
        shards += [
            Shard(name, split, start + a, start + b) for name, (a, b) in zip(names, ranges, strict=True)
        ]
        start += len(rows)
    return shards, {split: len(groups[split]) for split in order}, np.concatenate([groups[s] for s in order])


def _hold_out(groups: dict[str, np.ndarray], holdout: dict[str, int]) -> None:
    """Moves the first images of train to the splits of `holdout`."""
    for split, count in holdout.items():
        train = groups.get("train", np.empty(0, np.int64))
        if split in groups:
            raise ValueError(
                f"holdout: the source has a split {split!r} of its own; name another or leave it out"
            )
        if count >= len(train):
            raise ValueError(f"holdout: {split}={count} leaves nothing of the {len(train)} images in train")
        groups[split], groups["train"] = train[:count], train[count:]


def _cuts(rows: np.ndarray, sizes: np.ndarray, limit: ShardSize) -> list[int]:
    """The positions in a split at which its shards begin."""
    if limit.bytes is None:
        return list(range(0, len(rows), limit.samples))
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
    return cuts
