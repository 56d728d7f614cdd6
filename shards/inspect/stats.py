"""Computes statistics of each split of a data set: counts, caption lengths, image sizes, numbers of bytes."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from d2s.shards.format import manifest
from d2s.shards.format.file_names import MANIFEST

_COLUMNS = ["split", "shard", "image_size", "width", "height", "sparse", "dense"]


@dataclass
class SplitStats:
    """Statistics of one split. Each counter maps a value to its number of occurrences."""

    images: int = 0
    bytes: int = 0
    shards: set[str] = field(default_factory=set)
    words: dict[str, Counter] = field(default_factory=lambda: {"sparse": Counter(), "dense": Counter()})
    """Counts captions by their number of words, separately for sparse and dense captions."""
    widths: Counter = field(default_factory=Counter)
    heights: Counter = field(default_factory=Counter)


def stats(folder: Path) -> dict[str, SplitStats]:
    """Maps each split to its statistics. Raises ValueError if the manifest is missing, damaged or empty."""
    found: dict[str, SplitStats] = {}
    with manifest.open_manifest(folder) as file:
        for group in range(file.num_row_groups):
            try:
                columns = file.read_row_group(group, columns=_COLUMNS).to_pydict()
            except (pa.ArrowException, OSError) as error:
                reason = f"row group {group} is damaged: {str(error).splitlines()[0]}"
                raise ValueError(f"{folder / MANIFEST}: {reason}") from None
            if columns["split"]:
                _count(found.setdefault(columns["split"][0], SplitStats()), columns)
    if not found:
        raise ValueError(f"{folder / MANIFEST}: has no sample: build the data set again")
    return found


def _count(split: SplitStats, columns: dict[str, list]) -> None:
    """Adds the manifest rows of one shard, given as lists of column values, to `split`."""
    split.images += len(columns["split"])
    split.bytes += sum(columns["image_size"])
    split.shards.update(columns["shard"])
    split.widths.update(columns["width"])
    split.heights.update(columns["height"])
    for kind, words in split.words.items():
        words.update(len(caption.split()) for captions in columns[kind] for caption in captions)


def _quantiles(counter: Counter, fractions: tuple[float, ...]) -> list[int]:
    """Returns a quantile for each fraction. 0 gives the smallest value, 0.5 the median, 1 the largest value."""
    values = np.array(sorted(counter))
    ends = np.cumsum([counter[value] for value in values.tolist()])
    places = [min(len(values) - 1, int(np.searchsorted(ends, fraction * ends[-1]))) for fraction in fractions]
    return [int(values[place]) for place in places]


def table(found: dict[str, SplitStats]) -> str:
    """Returns the statistics as a table for a terminal."""
    sizes = "width min/median/max  height min/median/max"
    lines = [f"{'split':<8}{'images':>12}{'shards':>8}{'image MB':>11}  {sizes}"]
    for name, split in found.items():
        sides = ["/".join(map(str, _quantiles(side, (0, 0.5, 1)))) for side in (split.widths, split.heights)]
        counts = f"{split.images:>12,}{len(split.shards):>8,}{split.bytes / 1e6:>11,.1f}"
        lines.append(f"{name:<8}{counts}  {sides[0]:<21} {sides[1]}")
    lines += ["", f"{'split':<8}{'captions':<8}{'count':>12}{'per image':>11}  words mean  median  95 %  max"]
    for name, split in found.items():
        for kind, words in split.words.items():
            count = words.total()
            if not count:
                continue
            mean = sum(length * times for length, times in words.items()) / count
            median, high, most = _quantiles(words, (0.5, 0.95, 1))
            counts = f"{count:>12,}{count / split.images:>11.2f}"
            lines.append(f"{name:<8}{kind:<8}{counts}  {mean:>10.1f}{median:>8}{high:>6}{most:>5}")
    return "\n".join(lines)
