"""Counts, caption lengths, image sizes and bytes of a data set, split by split."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from d2s.shards.format import manifest

_COLUMNS = ["split", "shard", "image_size", "width", "height", "sparse", "dense"]


@dataclass
class SplitStats:
    """What one split holds; the counters map a value to how often it occurs."""

    images: int = 0
    bytes: int = 0
    shards: set[str] = field(default_factory=set)
    words: dict[str, Counter] = field(default_factory=lambda: {"sparse": Counter(), "dense": Counter()})
    widths: Counter = field(default_factory=Counter)
    heights: Counter = field(default_factory=Counter)


def stats(folder: Path) -> dict[str, SplitStats]:
    """Reads the manifest a shard at a time. Raises ValueError if there is none of ours with a sample in it."""
    found: dict[str, SplitStats] = {}
    with manifest.open_manifest(folder) as file:
        for group in range(file.num_row_groups):
            try:
                columns = file.read_row_group(group, columns=_COLUMNS).to_pydict()
            except (pa.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"{folder / manifest.NAME}: row group {group} is damaged: {reason}"
                ) from None
            if columns["split"]:
                _count(found, columns)
    if not found:
        raise ValueError(f"{folder / manifest.NAME}: has no sample: build the data set again")
    return found


def _count(found: dict[str, SplitStats], columns: dict[str, list]) -> None:
    """Adds the rows of one shard."""
    split = found.setdefault(columns["split"][0], SplitStats())
    split.images += len(columns["split"])
    split.bytes += sum(columns["image_size"])
    split.shards.update(columns["shard"])
    split.widths.update(columns["width"])
    split.heights.update(columns["height"])
    for kind, words in split.words.items():
        words.update(len(caption.split()) for captions in columns[kind] for caption in captions)


def quantiles(counter: Counter, fractions: tuple[float, ...]) -> list[int]:
    """The values below which these fractions of the counted things lie (0 is the smallest, 1 the largest)."""
    values = np.array(sorted(counter))
    ends = np.cumsum([counter[value] for value in values.tolist()])
    places = [min(len(values) - 1, int(np.searchsorted(ends, fraction * ends[-1]))) for fraction in fractions]
    return [int(values[place]) for place in places]


def table(found: dict[str, SplitStats]) -> str:
    """The statistics as text for a terminal."""
    lines = [
        f"{'split':<8}{'images':>12}{'shards':>8}{'image MB':>11}  width min/median/max  height min/median/max"
    ]
    for name, split in found.items():
        sides = ["/".join(map(str, quantiles(side, (0, 0.5, 1)))) for side in (split.widths, split.heights)]
        mb = f"{split.bytes / 1e6:,.1f}"
        lines.append(
            f"{name:<8}{split.images:>12,}{len(split.shards):>8,}{mb:>11}  {sides[0]:<21} {sides[1]}"
        )
    lines += ["", f"{'split':<8}{'captions':<8}{'count':>12}{'per image':>11}  words mean  median  95 %  max"]
    for name, split in found.items():
        for kind, words in split.words.items():
            count = words.total()
            if not count:
                continue
            mean = sum(length * times for length, times in words.items()) / count
            median, high, most = quantiles(words, (0.5, 0.95, 1))
            each = f"{count / split.images:.2f}"
            lines.append(
                f"{name:<8}{kind:<8}{count:>12,}{each:>11}  {mean:>10.1f}{median:>8}{high:>6}{most:>5}"
            )
    return "\n".join(lines)
