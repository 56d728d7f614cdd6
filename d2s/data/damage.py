"""Counts the damaged samples of a run. A sample counts once, even if several workers or starts of the run read it."""

import re
from collections.abc import Iterable, Iterator

from d2s.data.batch import Batch
from d2s.workers.collectives import run_on_all

# Matches the start of a DamagedSample message, which names the sample. The reason after it may differ between reads.
_SAMPLE = re.compile(r".*?\brow \d+\)?(?=: )")


def _sample(line: str) -> str:
    """Returns the part of a message that names the sample; the whole message if it names no row, as in a stream."""
    found = _SAMPLE.match(line)
    return found[0] if found else line


def add_new(known: list[str], lines: Iterable[str]) -> None:
    """Adds each message of `lines` to `known`, in place, unless `known` has a message about the same sample."""
    lines = list(lines)
    samples = {_sample(other) for other in known} if lines else set()
    for line in lines:
        if _sample(line) not in samples:
            samples.add(_sample(line))
            known.append(line)


def check_budget(known: list[str], budget: int) -> None:
    """Raises ValueError if there are more than `budget` damaged samples, the number that a run may replace."""
    if len(known) > budget:
        raise ValueError(
            f"data.damage_budget is {budget} but {len(known)} samples are damaged, the last: {known[-1]}: "
            "run `python -m d2s.shard verify` on the data"
        )


def count_damage(batches: Iterable[Batch], known: list[str], budget: int) -> Iterator[Batch]:
    """Yields `batches`, and adds their damaged samples to `known`. Raises ValueError if these exceed the budget."""
    for batch in batches:
        add_new(known, batch.damaged)
        check_budget(known, budget)
        yield batch


class Damage:
    """Keeps the damaged samples that this worker knows of, and shares them with the other workers.

    known: a message for each damaged sample. This worker's loader appends to it.
    """

    def __init__(self, known: list[str]) -> None:
        self.known = known
        self._shared = self._logged = len(known)

    def new_lines(self) -> list[str]:
        """Returns the messages that this worker added since the last call."""
        new = self.known[self._logged :]
        self._logged = len(self.known)
        return new

    @property
    def unshared(self) -> int:
        """Number of messages that this worker has not shared yet."""
        return len(self.known) - self._shared

    def share(self) -> None:
        """Gives every worker the same messages in the same order. All workers call it together."""
        mine = self.known[self._shared :]
        del self.known[self._shared :]
        for lines in run_on_all(lambda: mine):
            add_new(self.known, lines)
        self._shared = self._logged = len(self.known)

    def restore(self, lines: list[str]) -> None:
        """Replaces all messages by those of a checkpoint."""
        self.known[:] = lines
        self._shared = self._logged = len(lines)
