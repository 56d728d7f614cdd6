"""Counts the damaged samples of a run. A sample counts once, even if several workers or starts of the run read it."""

import re
from collections.abc import Iterable, Iterator

from d2s.data.batch import Batch
from d2s.workers.collectives import run_on_all

# Matches the start of a DamagedSample message, which names the sample. The reason after it may differ between reads.
_SAMPLE = re.compile(r".*?\brow \d+\)?(?=: )")


def _sample(line: str) -> str:
    """Returns the part of a message that names the sample. Returns the whole message if it contains no row number, as
    in a stream."""
    found = _SAMPLE.match(line)
    return found[0] if found else line


def add_new(known: list[str], lines: Iterable[str]) -> None:
    """Appends the messages in `lines` to `known`, except messages about a sample that `known` already mentions."""
    lines = list(lines)
    samples = {_sample(other) for other in known} if lines else set()
    for line in lines:
        if _sample(line) not in samples:
            samples.add(_sample(line))
            known.append(line)


def check_budget(known: list[str], budget: int) -> None:
    """Raises ValueError if `known` has more than `budget` messages. budget: `DataConfig.damage_budget`."""
    if len(known) > budget:
        raise ValueError(
            f"data.damage_budget is {budget} but {len(known)} samples are damaged, the last: {known[-1]}: "
            "run `python -m d2s.shard verify` on the data"
        )


def count_damage(batches: Iterable[Batch], known: list[str], budget: int) -> Iterator[Batch]:
    """Yields `batches`, and appends their messages about damaged samples to `known`; see :func:`check_budget`."""
    for batch in batches:
        add_new(known, batch.damaged)
        check_budget(known, budget)
        yield batch


class Damage:
    """Keeps messages about damaged samples, and shares them with the other workers.

    known: a message about each damaged sample that this worker knows of. This worker's loader appends to the list.
    """

    def __init__(self, known: list[str]) -> None:
        self.known = known
        self._shared = self._logged = len(known)

    def new_lines(self) -> list[str]:
        """Returns the messages that this worker's loader added since the last call of this method."""
        new = self.known[self._logged :]
        self._logged = len(self.known)
        return new

    @property
    def unshared(self) -> int:
        """Number of messages that this worker has not shared yet."""
        return len(self.known) - self._shared

    def share(self) -> None:
        """Gives every worker all messages, in the same order on each. All workers call this method together."""
        mine = self.known[self._shared :]
        del self.known[self._shared :]
        for lines in run_on_all(lambda: mine):
            add_new(self.known, lines)
        self._shared = self._logged = len(self.known)

    def restore(self, lines: list[str]) -> None:
        """Replaces all messages by `lines`, which come from a checkpoint."""
        self.known[:] = lines
        self._shared = self._logged = len(lines)
