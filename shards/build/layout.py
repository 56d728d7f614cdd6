"""Arranges images: shuffles them in each split and cuts them into shards, or leaves them in their tars."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from d2s.shards.format.keys import split_rank


@dataclass(frozen=True, kw_only=True)
class ShardSize:
    """Size of a shard: a number of samples or, if `bytes` is set, about that many bytes of source images."""

    samples: int | None = 1000
    bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How images are assigned to splits, ordered, and cut into shards."""

    shard_size: ShardSize = field(default_factory=ShardSize)
    seed: int = 0
    """seed of the random order within each split"""
    holdout: dict[str, int] = field(default_factory=dict)
    """maps each new split to how many train images are moved to it, chosen by the same shuffle"""
    in_place: Path | None = None
    """folder of existing tars that stay unchanged: each tar becomes a shard and keeps its order"""


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard: the images at positions start..stop - 1 in the final order of all images."""

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
    """Orders each split by hash and cuts it into shards. Tars in place keep their order.

    Args:
        groups: maps each split to the numbers of its images, int64, in the order of the source.
        shuffle: uint64 (images,), the keyed hash of each image; images are ordered by it.
        sizes: int64 (images,), the size of each image in bytes, or -1 if it is unknown.
        tars: int32 (images,), the number of each image's tar; and the list of the paths of the tars.

    Returns:
        The shards; the number of images in each split; and the numbers of all images in final order, int64.

    Raises:
        ValueError: an empty split, a holdout that is too large, or a shard size in bytes for unknown sizes.
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
    """Returns the positions in a split at which its shards begin."""
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
