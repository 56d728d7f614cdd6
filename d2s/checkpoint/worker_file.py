"""A worker's share of a checkpoint: pieces of named tensors in one safetensors file.

A file holds flat runs of elements under keys such as `weight/model.norm.bias@128`: the tensor, and where the run
starts. Files are written piece by piece, so that a save needs no memory beside one tensor's; and read by ranges,
so that a worker takes from the files of all workers just what it holds itself.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2s.checkpoint.zero_state import Piece

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_BUFFER = 1 << 20


def own_share(pieces: Iterable[Piece], rank: int, world: int) -> Iterator[Piece]:
    """Of pieces that all workers hold alike each worker takes a part; other pieces are the worker's own."""
    for piece in pieces:
        if not piece.shared:
            yield piece
            continue
        count = len(piece.values)
        first, end = count * rank // world, count * (rank + 1) // world
        if first < end:
            yield Piece(piece.name, piece.start + first, piece.values[first:end], True)


def write_share(path: Path, pieces: Iterable[Piece]) -> str:
    """Writes pieces to a new safetensors file, flushed to disk, and returns the sha256 of what was meant to be in it.

    Raises OSError where the disk does not take it.
    """
    # The format wants no gaps; wide numbers first keeps each run aligned to its own width.
    pieces = sorted(pieces, key=lambda piece: -piece.values.element_size())
    header: dict[str, Any] = {}
    end = 0
    for piece in pieces:
        start, end = end, end + piece.values.nbytes
        kind, shape = _DTYPES[piece.values.dtype], [len(piece.values)]
        header[f"{piece.name}@{piece.start}"] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb", buffering=_BUFFER) as file:
        for data in _content(text, pieces):
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _content(header: bytes, pieces: list[Piece]) -> Iterator[bytes | memoryview]:
    """A safetensors file's bytes, those of one piece at a time coming from its device."""
    yield len(header).to_bytes(8, "little")
    yield header
    for piece in pieces:
        yield memoryview(piece.values.detach().cpu().contiguous().view(torch.uint8).numpy())


class Shares:
    """All workers' files of one checkpoint, to be read by ranges.

    Raises ValueError, naming the file, where one is missing or is not such a file.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._open = ExitStack()
        self._runs: dict[str, list[tuple[int, int, Any, str]]] = defaultdict(list)
        for path in files:
            try:
                file = self._open.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                self._open.close()
                raise ValueError(f"{path.name}: {error}") from error
            for key in file.keys():  # noqa: SIM118 (it is no dictionary)
                name, _, start = key.rpartition("@")
                first = int(start)
                self._runs[name].append((first, first + file.get_slice(key).get_shape()[0], file, key))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def sizes(self) -> dict[str, int]:
        """Names, and how many elements of each the files hold together."""
        return {name: sum(end - start for start, end, *_ in runs) for name, runs in self._runs.items()}

    def fill(self, piece: Piece) -> None:
        """Copies what the piece is to hold into it. Raises ValueError where the files do not hold all of it."""
        first, last = piece.start, piece.start + len(piece.values)
        filled = 0
        for start, end, file, key in self._runs.get(piece.name, ()):
            low, high = max(start, first), min(end, last)
            if low < high:
                values: Tensor = file.get_slice(key)[low - start : high - start]
                piece.values[low - first : high - first].copy_(values)
                filled += high - low
        if filled != len(piece.values):
            raise ValueError(f"{piece.name} has {filled} of {len(piece.values)} elements from {first} on")
