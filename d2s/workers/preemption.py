"""Preemption: a worker receives a stop signal, all workers agree to stop, and the run ends with exit code 75.

Before a cluster takes a machine back, it sends a stop signal: USR1 or USR2 if the batch script asked for one, or else
TERM. The handler only records the signal, because all workers must write the checkpoint together, after the same
training step. This file does not import torch, so that handlers can be installed before any slow import.
"""

import os
import signal
import sys
from types import FrameType

PREEMPTED = 75
"""Exit code of a run that stopped after a signal and can be resumed: EX_TEMPFAIL of sysexits.h."""
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""Stop signals, lowest priority first. TERM has the highest priority: it may mean that the job is cancelled."""


class Preempted(Exception):
    """Raised on all workers together, after one of them received a stop signal."""


class Preemption:
    """Records the stop signals of this worker, and agrees with the other workers to stop."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the highest-priority signal that this worker received; 0 for none."""

    def install(self) -> None:
        """Installs the handlers of the stop signals. Only the main thread may call this method."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def uninstall(self) -> None:
        """Removes the handlers, so that TERM ends this process. Called if this worker has nothing left to save."""
        for number in SIGNALS:
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # The handler must do nothing else, because it can interrupt any statement.
        self.received = max(self.received, number, key=_priority)

    def agreed(self) -> int:
        """Returns the highest-priority signal that any worker received; 0 for none. All workers call it together."""
        from d2s.workers.collectives import max_over_workers

        # Compare priorities, because signal numbers differ between systems and are not in order of priority.
        highest = max_over_workers(_priority(self.received))
        return SIGNALS[highest - 1] if highest else 0

    def check(self) -> None:
        """Raises Preempted on all workers if any worker received a stop signal. All workers call this together.
        The exchange is an all-reduce of one number. Does nothing if there are several workers but no process group
        yet, because this worker would stop alone, and the other workers would wait for it."""
        from d2s.workers.group import in_group

        if not in_group() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return
        number = self.agreed()
        if number:
            raise Preempted(f"preempted by {signal.Signals(number).name}")


def leave_group(code: int, *, ordered: bool) -> None:
    """Ends this process by `d2s.workers.group.leave`. Returns if torch was not imported, so there is no group."""
    if "torch" in sys.modules:
        from d2s.workers.group import leave

        leave(code, ordered=ordered)


def _priority(number: int) -> int:
    return SIGNALS.index(number) + 1 if number in SIGNALS else 0
