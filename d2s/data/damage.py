"""Damaged samples, each counted once: over all workers that read it, and over all starts of a run."""

import re
from collections.abc import Iterable, Iterator

from d2s.data.batch import Batch
from d2s.workers.collectives import run_on_all

# The part of a DamagedSample line that names the sample; the reason after it may differ from read to read.
_SAMPLE = re.compile(r".*?\brow \d+\)?(?=: )")


def _sample(line: str) -> str:
    """The sample that a line is about; the line itself if it names no row, as in a stream."""
    found = _SAMPLE.match(line)
    return found[0] if found else line


def add_new(known: list[str], lines: Iterable[str]) -> None:
    """Adds to `known`, in place, the lines about samples that it does not name yet."""
    lines = list(lines)
    samples = {_sample(other) for other in known} if lines else set()
    for line in lines:
        if _sample(line) not in samples:
            samples.add(_sample(line))
            known.append(line)


def check_budget(known: list[str], budget: int) -> None:
    """Raises ValueError if more samples are damaged than a run may replace."""
    if len(known) > budget:
        raise ValueError(
            f"data.damage_budget is {budget} but {len(known)} samples are damaged, the last: {known[-1]}: "
            "run `python -m d2s.shard verify` on the data"
        )


def count_damage(batches: Iterable[Batch], known: list[str], budget: int) -> Iterator[Batch]:
    """Passes batches on, and adds their damaged samples to `known`. Raises ValueError above the budget."""
    for batch in batches:
        add_new(known, batch.damaged)
        check_budget(known, budget)
        yield batch


class Damage:
    """The damaged samples that all workers know of.

    known: a line for each sample; this worker's loader appends to it.
    """

    def __init__(self, known: list[str]) -> None:
        self.known = known
        self._shared = self._logged = len(known)

    def new_lines(self) -> list[str]:
        """This worker's lines since the last call."""
        new = self.known[self._logged :]
        self._logged = len(self.known)
        return new

    @property
    def unshared(self) -> int:
        """Number of lines that the other workers do not have yet."""
        return len(self.known) - self._shared

    def share(self) -> None:
        """Exchanges the new lines of all workers, which call it together; then all know the same, in one order."""
        mine = self.known[self._shared :]
        del self.known[self._shared :]
        for lines in run_on_all(lambda: mine):
            add_new(self.known, lines)
        self._shared = self._logged = len(self.known)

    def restore(self, lines: list[str]) -> None:
        """Starts from the lines of a checkpoint."""
        self.known[:] = lines
        self._shared = self._logged = len(lines)
