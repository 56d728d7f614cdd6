"""Arranges images in shards. Shuffles and cuts each split, or leaves the images in their existing tars."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from d2s.shards.format.keys import split_rank


@dataclass(frozen=True, kw_only=True)
class ShardSize:
    """The size of a shard: `samples` samples or, if `bytes` is set, about `bytes` bytes of source images."""

    samples: int | None = 1000
    bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Settings that say how images are assigned to splits, ordered, and cut into shards."""

    shard_size: ShardSize = field(default_factory=ShardSize)
    seed: int = 0
    """Seed of the random order within each split."""
    holdout: dict[str, int] = field(default_factory=dict)
    """Maps each new split to the number of train images that move there: the first ones after the shuffle."""
    in_place: Path | None = None
    """Folder of existing tars that stay unchanged, or None. Each tar becomes a shard and keeps its order."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard. It has the images at positions `start` to `stop` - 1 in the final order of all images."""

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
    """Orders the images of each split by their hashes, and cuts the split into shards.

    If `layout.in_place` is set, each tar is a shard and keeps its order.

    Args:
        groups: maps each split to the int64 numbers of its images, in the order of the source.
        shuffle: the keyed hash of each image, uint64 of shape (images,). Images are ordered by hash.
        sizes: the size of each image in bytes, or -1 if it is unknown. It is int64 of shape (images,).
        tars: the number of each image's tar, int32 of shape (images,), and the list of the tars' paths.

    Returns:
        (shards, counts, order): `counts` maps each split to its number of images. `order` has the int64 numbers of
        all images in their final order.

    Raises:
        ValueError: a split is empty, a holdout is too large, or the shard size is in bytes but a size is unknown.
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
    """Moves the first images of train to the new splits of `holdout`. Changes `groups`. Raises ValueError."""
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
    """Returns the positions in `rows`, the images of a split, at which shards begin."""
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
