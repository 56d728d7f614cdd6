"""Reads samples by row, usually with one `pread` per sample, and checks them with checksums of the index."""

import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass

from d2s.common.files import parse_json
from d2s.shards.read.index import DamagedSample, Location, ShardIndex

__all__ = ["DamagedSample", "Record", "ShardReader"]

# In the shards of a build, only a tar header and padding lie between an image and its JSON. So one read gets both.
# In other tars, more bytes may lie between them. If there are more than _GAP bytes, two reads are used.
_GAP = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Record:
    """A sample with its data as stored in the shard."""

    row: int
    """Row in the index, or -1 for a sample of a stream."""
    key: str
    image: bytes
    """The content of the encoded image file."""
    sparse: tuple[str, ...]
    dense: tuple[str, ...]
    image_id: int


class ShardReader:
    """Reads samples by their row. Opens a file when it is first needed. It is safe to fork and to pickle.

    Args:
        index: the opened index.
        verify: whether to check each sample's CRC-32. The check takes about 1 % of the time to decode an image.
        max_open: maximum number of open files. The least recently used file is closed first.
    """

    def __init__(self, index: ShardIndex, verify: bool = True, max_open: int = 64) -> None:
        self.index, self.verify, self.max_open = index, verify, max_open
        self._files: OrderedDict[str, int] = OrderedDict()

    def __reduce__(self) -> tuple:
        return type(self), (self.index, self.verify, self.max_open)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Closes the open files. A later read opens its file again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def record(self, row: int) -> Record:
        """Reads, checks and parses the sample of a row.

        Raises:
            DamagedSample: the sample cannot be read or parsed, or its length or checksum differs from the index.
        """
        place = self.index.location(row)
        try:
            image, text = self._members(place)
        except OSError as error:
            raise self.damaged(row, f"cannot be read: {error.strerror or error}") from None
        if len(image) != place.image_size or len(text) != place.json_size:
            raise self.damaged(row, "the file ends before the sample does")
        if self.verify and (found := zlib.crc32(text, zlib.crc32(image))) != place.crc32:
            raise self.damaged(row, f"crc32 is {found:08x}, the index says {place.crc32:08x}")
        key, sparse, dense = self._captions(row, text)
        image_id = int(self.index.column("image_id")[row])
        return Record(row=row, key=key, image=image, sparse=sparse, dense=dense, image_id=image_id)

    def captions(self, row: int) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """Returns the key, the sparse captions and the dense captions of a row, without a check of the CRC-32.

        Raises:
            DamagedSample: the captions cannot be read or parsed, or their number differs from the index.
        """
        place = self.index.location(row)
        try:
            text = os.pread(self._file(place.json_file), place.json_size, place.json_offset)
        except OSError as error:
            raise self.damaged(row, f"cannot be read: {error.strerror or error}") from None
        return self._captions(row, text)

    def damaged(self, row: int, reason: str) -> DamagedSample:
        """Returns an error for the caller to raise. It names the shard and, if the manifest is readable, the key."""
        try:
            key = f"key {self.index.keys([row])[0]} (row {row})"
        except ValueError:
            key = f"row {row}"
        return DamagedSample(self.index.location(row).shard, key, reason)

    def _captions(self, row: int, text: bytes) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        try:
            fields = parse_json(text)
            key, sparse, dense = fields["key"], tuple(fields["sparse"]), tuple(fields["dense"])
        except (ValueError, KeyError, TypeError) as error:
            raise self.damaged(row, f"its JSON cannot be used: {error!r}") from None
        counts = (int(self.index.column("n_sparse")[row]), int(self.index.column("n_dense")[row]))
        if (len(sparse), len(dense)) != counts:
            raise self.damaged(row, f"has {len(sparse)} + {len(dense)} captions, the index says {counts}")
        return key, sparse, dense

    def _members(self, place: Location) -> tuple[bytes, bytes]:
        file = self._file(place.shard)
        gap = place.json_offset - place.image_offset - place.image_size
        if place.json_file == place.shard and 0 <= gap <= _GAP:
            start = place.json_offset - place.image_offset
            both = os.pread(file, start + place.json_size, place.image_offset)
            return both[: place.image_size], both[start:]
        image = os.pread(file, place.image_size, place.image_offset)
        return image, os.pread(self._file(place.json_file), place.json_size, place.json_offset)

    def _file(self, name: str) -> int:
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        file = os.open(self.index.root / name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._files[name] = file
        if len(self._files) > self.max_open:
            os.close(self._files.popitem(last=False)[1])
        return file
