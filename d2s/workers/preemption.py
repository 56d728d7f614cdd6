"""Preemption: a signal asks, all workers agree, the run stops where it can go on, with exit code 75.

A cluster that takes a machine back sends a signal first (USR1 or USR2 as the batch script asked for, TERM
otherwise). The handler only sets a flag: a checkpoint is written by all workers together, at a point that all of
them reach. Heavy imports are left to the functions, since the handler is to stand before any of them.

A run that is put back in the queue for ever without getting further eats a cluster's time: `restarts.json` in
the run folder counts the starts from one and the same checkpoint (:func:`count_start`).
"""

import hashlib
import json
import os
import signal
from pathlib import Path
from types import FrameType

from d2s.common.files import write_json

PREEMPTED = 75
"""Exit code of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h."""
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""What asks a run to stop. Of several the last one of this order counts: TERM may be a job's cancellation."""
RESTARTS = "restarts.json"
_MARKER = "complete.json"  # of d2s.checkpoint.store, which brings torch


class Preempted(Exception):
    """Raised on all workers together once they have agreed to stop."""

    def __init__(self, name: str) -> None:
        super().__init__(f"preempted by {name}")


class StalledError(Exception):
    """A restart that would begin where several before it began."""


class Preemption:
    """Whether this worker was asked to stop, and whether all know of it."""

    def __init__(self) -> None:
        self.asked = 0
        """Number of the signal that came, the one that counts of several, 0 where none did."""

    def install(self) -> None:
        """Takes the signals from now on. Only the main thread may call it."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def uninstall(self) -> None:
        """Lets a launcher's TERM end a worker that has nothing left to save."""
        for number in SIGNALS:
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Nothing else may happen here: it interrupts any statement, that of a save included.
        self.asked = max(self.asked, number, key=_weight)

    def agreed(self) -> int:
        """The number of the signal that counts of all that any worker got, 0 for none. All must call it together."""
        from d2s.workers.group import max_over_workers

        # Not the numbers themselves: their order is another one on other systems.
        most = max_over_workers(_weight(self.asked))
        return SIGNALS[most - 1] if most else 0

    def check(self) -> None:
        """Raises :class:`Preempted` on all workers if any of them was asked. All must call it together.

        It costs one exchange of a number, and may stand between any two micro-batches or evaluation batches.
        Before the workers have met it raises only where there is just one: fellows would wait for it in vain.
        """
        from d2s.workers.group import in_group

        if not in_group() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return
        number = self.agreed()
        if number:
            raise Preempted(signal.Signals(number).name)


def _weight(number: int) -> int:
    return SIGNALS.index(number) + 1 if number in SIGNALS else 0


def spare_loader(number: int) -> None:
    """Lets a loader process, whose `number` does not matter, live on when a whole job is signalled.

    It ends with the process that it loads for, or as soon as that one is gone.
    """
    for name in SIGNALS:
        signal.signal(name, signal.SIG_IGN)


def count_start(run: Path, checkpoint: Path | None, limit: int) -> None:
    """Notes in the run folder that a start begins at `checkpoint` (None: at the beginning). One worker calls it.

    Raises StalledError where `limit` (0: any number) starts before it began there too, and left nothing newer.
    """
    place = _place(checkpoint)
    starts = _starts(run, place)
    if limit and starts >= limit:
        raise StalledError(
            f"{starts} starts in a row began at {place['from']} and saved nothing after it: the next would not get "
            "further. Save more often (checkpoint.every_steps, checkpoint.every_minutes) or give the job more "
            "time, and resume with --checkpoint.max_stalled_restarts 0"
        )
    write_json(run / RESTARTS, {**place, "starts": starts + 1})


def forget_start(run: Path) -> None:
    """Takes back what :func:`count_start` noted: a user who interrupts a run is no queue that wastes time."""
    (run / RESTARTS).unlink(missing_ok=True)


def _place(checkpoint: Path | None) -> dict[str, str]:
    """A checkpoint's name, and a digest of its marker, which changes as soon as its validation is done."""
    if checkpoint is None:
        return {"from": "the beginning", "digest": ""}
    marker = (checkpoint / _MARKER).read_bytes()
    return {"from": checkpoint.name, "digest": hashlib.sha256(marker).hexdigest()[:16]}


def _starts(run: Path, place: dict[str, str]) -> int:
    path = run / RESTARTS
    if not path.is_file():
        return 0
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return 0  # no longer known: count anew
    if not isinstance(saved, dict) or any(saved.get(name) != value for name, value in place.items()):
        return 0
    starts = saved.get("starts")
    return starts if isinstance(starts, int) else 0
