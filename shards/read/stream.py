"""Streams samples from the tars of a URL pattern, with webdataset and without an index.

Streaming is for shards that are too large or too far away to index. It has three drawbacks:

- An epoch has as many samples as the user sets. It may miss some samples of the tars and repeat others.
- The order depends on the number of workers and loader processes.
- An epoch that is resumed does not continue at the same sample, but starts on other shards.

Still, every worker makes the same number of training steps, and all random choices follow from the seed.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count

import numpy as np
import webdataset as wds

from d2s.common.messages import one_line, shorten
from d2s.shards.format.tar import CutShort, read_members
from d2s.shards.format.tar_samples import Group, Suffixes, group, member_json, member_text
from d2s.shards.order import draws
from d2s.shards.order.permutation import Permutation
from d2s.shards.read.records import Record

SPARSE_COLUMNS = ("sparse", "caption", "txt")
DENSE_COLUMNS = ("dense",)
_EMPTY_PASSES = 8


def is_pattern(data: str) -> bool:
    """Returns whether --data names tars to stream: a URL, braces or a .tar. False for an existing folder."""
    if os.path.isdir(data):
        return False
    return "://" in data or "{" in data or data.startswith("pipe:") or data.endswith(".tar")


def expand(pattern: str) -> list[str]:
    """Returns the tars of a pattern such as `https://host/{00000..00099}.tar`; `::` joins patterns.

    Raises:
        ValueError: a brace is not closed.
    """
    try:
        return list(wds.shardlists.expand_urls(pattern))
    except ValueError as error:  # braceexpand's UnbalancedBracesError is one
        raise ValueError(f"data is {pattern!r}, which is no pattern of tars: {error}") from None


class Stream:
    """An endless sequence of samples for one of several readers.

    Args:
        urls: the tars, at least one.
        seed: seed for the order of the tars and for the shuffle buffer.
        reader, readers: index of this reader, and number of readers (workers times loader processes). If
            there are fewer tars than readers, each reader reads all tars and uses every `readers`-th sample.
        buffer: number of samples in the shuffle buffer.
        budget: maximum number of entries in `notes`.
        sparse_columns, dense_columns: names of fields in a sample's JSON (a string or a list of strings) or
            suffixes of its text files ("txt") that contain captions. Duplicate captions are used once.
    Attributes:
        notes: a message for each sample or tar that could not be used. The caller prints and removes them.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        seed: int,
        reader: int = 0,
        readers: int = 1,
        buffer: int = 1000,
        budget: int = 100,
        sparse_columns: Sequence[str] = SPARSE_COLUMNS,
        dense_columns: Sequence[str] = DENSE_COLUMNS,
    ) -> None:
        assert urls, "no tars"
        self.urls, self.seed, self.buffer = list(urls), seed, buffer
        self.reader, self.readers, self.budget = reader, readers, budget
        self.columns = (tuple(sparse_columns), tuple(dense_columns))
        self.notes: list[str] = []

    def samples(self, epoch: int, usable: Callable[[Record], str | None]) -> Iterator[tuple[int, Record]]:
        """Yields (number, sample) without end. The number seeds the random draws. `row` of a sample is -1.

        Args:
            usable: returns the reason why a sample cannot be used, or None if it can.
        Raises:
            ValueError: eight passes over the tars in a row gave no usable sample, or `notes` is full.
        """
        empty = 0
        for number in count():
            found = 0
            for url, sample in self.one_pass(epoch, number):
                where = f"{url}: key {sample.key}"
                record = self._record(sample, where)
                reason = usable(record) if record else None
                if reason:
                    self.note(f"{where}: {reason}")
                elif record:
                    found += 1
                    yield draws.hash_name(f"{number}/{where}") >> 1, record
            # In one pass this reader may get only bad tars; in the next pass it gets others.
            empty = 0 if found else empty + 1
            if empty == _EMPTY_PASSES:
                last = f", the last: {self.notes[-1]}" if self.notes else ""
                raise ValueError(f"data has no usable sample in {len(self.urls)} tars{last}")

    def note(self, line: str) -> None:
        """Adds a message to `notes` about a sample or tar that could not be used.

        Raises:
            ValueError: `notes` has more than `budget` entries, which no batch has reported yet.
        """
        line = one_line(line)
        if line not in self.notes:
            self.notes.append(line)
        if len(self.notes) > self.budget:
            raise ValueError(f"damage_budget is {self.budget} but more is damaged, the last: {line}")

    def one_pass(self, epoch: int, number: int) -> Iterator[tuple[str, Group[bytes]]]:
        """Returns an iterator of shuffled (tar, sample) for pass `number` over this reader's tars."""
        order = Permutation(len(self.urls), self.seed, epoch, part=number)(np.arange(len(self.urls)))
        enough = len(order) >= self.readers
        mine = [self.urls[i] for i in (order[self.reader :: self.readers] if enough else order)]
        bits = draws.bits(self.seed, epoch, [number * self.readers + self.reader], "buffer")
        samples = (sample for url in mine for sample in self._samples_of(url))
        if not enough:
            samples = (s for i, s in enumerate(samples) if i % self.readers == self.reader)
        shuffle = wds.shuffle(self.buffer, initial=self.buffer, rng=random.Random(int(bits[0, 0])))
        return iter(shuffle(samples))

    def _samples_of(self, url: str) -> Iterator[tuple[str, Group[bytes]]]:
        """Yields (tar, sample) from one tar. If the tar cannot be read to its end, adds a note."""

        def note(error: Exception) -> bool:
            self.note(f"{url}: {type(error).__name__}: {error}")
            return True

        for opened in wds.tariterators.url_opener([{"url": url}], handler=note):
            try:
                yield from ((url, sample) for sample in group(read_members(opened["stream"])))
            except CutShort as error:
                self.note(f"{url}: {error}")

    def _record(self, sample: Group[bytes], where: str) -> Record | None:
        doing = ""
        try:
            if sample.faults:
                raise ValueError(sample.faults[0])
            image = sample.image(Suffixes())
            doing = "its captions cannot be used: "
            fields = member_json(sample.members.get("json", b"{}"))
            sparse, dense = (_captions(sample.members, fields, columns) for columns in self.columns)
            if fields and not sparse and not dense:
                there = shorten(", ".join(fields), 150)
                raise ValueError(f"none in {', '.join(sum(self.columns, ()))}; the JSON has {there}")
        except ValueError as error:
            self.note(f"{where}: {doing}{error}")
            return None
        number = fields.get("image_id")
        if type(number) is not int or abs(number) >= 1 << 63:
            number = draws.hash_name(where) >> 1
        return Record(row=-1, key=sample.key, image=image, sparse=sparse, dense=dense, image_id=number)


def _captions(members: dict[str, bytes], fields: dict, columns: tuple[str, ...]) -> tuple[str, ...]:
    found: list[str] = []
    for column in columns:
        value = fields.get(column)
        if value is None and column in members and column != "json":
            value = member_text(members[column], column)
        texts = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"column {column!r} is no text")
        found += [text.strip() for text in texts if text.strip()]
    return tuple(dict.fromkeys(found))
