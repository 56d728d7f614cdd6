"""Damaged samples, each counted once: by every worker that meets it, and from one start of a run to the next."""

import re
from collections.abc import Iterable

from d2s.workers.group import run_on_all

# What names the sample in a line of DamagedSample; the reason behind it may differ from read to read.
_SAMPLE = re.compile(r".*?\brow \d+\)?(?=: )")


def _sample(line: str) -> str:
    """The sample that a line is about; the line itself where it does not name a row, as those of a stream."""
    found = _SAMPLE.match(line)
    return found[0] if found else line


def add_new(known: list[str], lines: Iterable[str]) -> None:
    """Adds those of the lines that are about other samples than the known ones, in place."""
    samples = None
    for line in lines:
        if samples is None:
            samples = {_sample(other) for other in known}
        if _sample(line) not in samples:
            samples.add(_sample(line))
            known.append(line)


def check_budget(known: list[str], budget: int) -> None:
    """Raises ValueError where more samples are damaged than a run may replace."""
    if len(known) > budget:
        raise ValueError(
            f"data.damage_budget is {budget} but {len(known)} samples are damaged, the last: {known[-1]}: "
            "run `python -m d2s.shard verify` on the data"
        )


class Damage:
    """What all workers know of damaged samples.

    known: a line for each sample, to which this worker's loader adds what it meets.
    """

    def __init__(self, known: list[str]) -> None:
        self.known = known
        self._shared = self._said = len(known)

    def to_say(self) -> list[str]:
        """This worker's lines since the last call."""
        new = self.known[self._said :]
        self._said = len(self.known)
        return new

    @property
    def unshared(self) -> int:
        """How many lines the other workers do not know of yet."""
        return len(self.known) - self._shared

    def share(self) -> None:
        """Tells all workers of this one's new lines, all of which call it together: each then knows the same."""
        mine = self.known[self._shared :]
        del self.known[self._shared :]
        for lines in run_on_all(lambda: mine):
            add_new(self.known, lines)
        self._shared = self._said = len(self.known)

    def restore(self, lines: list[str]) -> None:
        """Begins with what a run knew when it was saved."""
        self.known[:] = lines
        self._shared = self._said = len(lines)
