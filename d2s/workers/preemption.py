"""Preemption: a worker receives a stop signal, all workers agree, and the run stops with exit code 75.

A cluster that takes a machine back sends a signal first: USR1 or USR2 if the batch script asked for it, else TERM.
The handler only notes the signal, because a checkpoint is written by all workers together, after a step that all
have finished. This file needs no torch, so that the handlers are installed before any slow import.
"""

import os
import signal
import sys
from types import FrameType

PREEMPTED = 75
"""Exit code of a run that stopped on request and can be resumed: EX_TEMPFAIL of sysexits.h."""
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""Signals that ask a run to stop, lowest priority first: TERM may mean that the job is cancelled."""


class Preempted(Exception):
    """Raised on all workers together once they have agreed to stop."""


class Preemption:
    """Notes this worker's stop signals, and agrees with the other workers to stop."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the highest-priority signal received; 0 for none."""

    def install(self) -> None:
        """Handles the stop signals from now on. Only the main thread may call it."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def uninstall(self) -> None:
        """Restores the default: a launcher's TERM ends a worker that has nothing left to save."""
        for number in SIGNALS:
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # No more than this: the handler can interrupt any statement, even one that is writing a checkpoint.
        self.received = max(self.received, number, key=_priority)

    def agreed(self) -> int:
        """Highest-priority signal that any worker received, 0 for none. All workers call it together."""
        from d2s.workers.collectives import max_over_workers

        # Priorities and not the signals' numbers, which do not order them and differ between systems.
        highest = max_over_workers(_priority(self.received))
        return SIGNALS[highest - 1] if highest else 0

    def check(self) -> None:
        """Raises :class:`Preempted` on all workers if any of them received a signal. All workers call it together.

        It costs one all-reduce of a number. Before the process group has started it does nothing, unless this is
        the only worker: the others would wait in vain for one that stopped alone.
        """
        from d2s.workers.group import in_group

        if not in_group() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return
        number = self.agreed()
        if number:
            raise Preempted(f"preempted by {signal.Signals(number).name}")


def leave_group(code: int, *, ordered: bool) -> None:
    """Ends this process as `d2s.workers.group.leave` does if torch was loaded; else just returns."""
    if "torch" in sys.modules:
        from d2s.workers.group import leave

        leave(code, ordered=ordered)


def _priority(number: int) -> int:
    return SIGNALS.index(number) + 1 if number in SIGNALS else 0
