"""Reads and writes one worker's file of a checkpoint, in safetensors format.

A file contains slices, which are consecutive elements of flattened tensors. The key of a slice, such as
`weight/model.norm.bias@128`, contains the tensor's name and the index of the slice's first element.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from d2s.checkpoint.zero_state import TensorSlice
from d2s.common.files import file_sha256, sync_path


def slices_to_write(slices: Iterable[TensorSlice], rank: int, world: int) -> Iterator[TensorSlice]:
    """Yields the slices that worker `rank` writes. `world` is the number of workers.

    A slice that all workers hold is divided into `world` equal parts, and each worker writes one part. A
    slice that only this worker holds is written in full.
    """
    for one in slices:
        if not one.replicated:
            yield one
            continue
        count = len(one.values)
        first, end = count * rank // world, count * (rank + 1) // world
        if first < end:
            yield TensorSlice(one.name, one.start + first, one.values[first:end], True)


def write_slices(path: Path, slices: Iterable[TensorSlice]) -> str:
    """Writes slices to a new safetensors file and flushes it to disk. Returns the file's sha256.

    Raises OSError, with the path, if the disk is full or the file cannot be written.
    """
    tensors = {f"{one.name}@{one.start}": one.values.detach().cpu() for one in slices}
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(0, str(error), str(path)) from error
    sync_path(path)
    return file_sha256(path)


class WorkerFiles(ExitStack):
    """Opens the files of all workers in one checkpoint, and reads slices from them.

    Raises ValueError, with the file's name, if a file is missing or is not in safetensors format.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        super().__init__()
        self._runs: dict[str, list[tuple[int, int, Any, str]]] = defaultdict(list)
        for path in files:
            try:
                file = self.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                self.close()
                raise ValueError(f"{path.name}: {error}") from error
            for key in file.keys():  # noqa: SIM118 (`file` is not a dictionary)
                name, _, start = key.rpartition("@")
                first = int(start)
                self._runs[name].append((first, first + file.get_slice(key).get_shape()[0], file, key))

    def element_counts(self) -> dict[str, int]:
        """Returns a dictionary from tensor names to numbers of elements, counted over all files."""
        return {name: sum(end - start for start, end, *_ in runs) for name, runs in self._runs.items()}

    def read_into(self, target: TensorSlice) -> None:
        """Fills `target.values` from the files. Raises ValueError if the files lack some elements."""
        first, last = target.start, target.start + len(target.values)
        filled = 0
        for start, end, file, key in self._runs.get(target.name, ()):
            low, high = max(start, first), min(end, last)
            if low < high:
                target.values[low - first : high - first].copy_(
                    file.get_slice(key)[low - start : high - start]
                )
                filled += high - low
        if filled != len(target.values):
            raise ValueError(f"{target.name} has {filled} of {len(target.values)} elements from {first} on")
