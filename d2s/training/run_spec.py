"""One run as the user described it, checked, with the numbers that follow import os
from it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2s.data.batch import Captions
from d2s.shards.order.permutation import steps_per_epoch
from d2s.shards.read.index import ShardIndex
from d2s.shards.read.stream import is_pattern
from d2s.training.config import TrainConfig
from d2s.training.engine import engine_settings


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A checked run, before anything is built; :func:`d2s.training.checks.check_arguments` makes it."""

    config: TrainConfig
    data: str
    """The --data argument: a data set's folder, or a pattern of tars to stream."""
    index: ShardIndex
    """Index of the data set, or of the data set to validate on where tars are streamed."""
    run: Path | None
    """The run folder; None for a dry run without one."""
    init: Path | None
    """The stage-1 model folder to start from."""
    resume: bool
    resume_from: Path | None
    """The checkpoint to continue from; None for a new run."""
    world: int
    """Number of workers."""

    @property
    def streams(self) -> bool:
        """Whether the training data is a stream of tars without an index."""
        return is_pattern(self.data)

    @property
    def captions(self) -> Captions:
        """Which captions a training batch holds."""
        if self.config.stage == "pretrain":
            return "dense"
        return "both" if self.config.loss.distill_weight else "sparse"

    @property
    def items(self) -> int:
        """Images, image-caption pairs, or samples of a stream in an epoch."""
        if self.streams:
            return self.config.samples_per_epoch
        if self.config.stage == "finetune" and self.config.data.sparse == "all":
            return self.index.n_sparse_total("train")
        return len(self.index.rows("train"))

    @property
    def steps_per_epoch(self) -> int:
        """Optimization steps in an epoch. Raises ValueError where the batch is larger than the data."""
        return steps_per_epoch(self.items, self.config.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimization steps of the whole run."""
        return self.config.max_steps or self.config.epochs * self.steps_per_epoch

    @property
    def local_batch(self) -> int:
        """Pairs of the global batch on one worker."""
        return self.config.batch_size // self.world

    def engine_settings(self) -> dict[str, Any]:
        """DeepSpeed's settings. Raises ValueError for a mistake in the user's DeepSpeed JSON."""
        return engine_settings(self.config.engine, self.local_batch, self.config.optim.grad_clip)

    def origin(self) -> dict[str, Any]:
        """Returns the data, their fingerprint and the initial model. A resumed run must have the same.

        Folders are absolute, so that the run can be resumed from another working directory.
        """
        return {
            "data": self.data if self.streams else os.path.abspath(self.data),
            "val_data": os.path.abspath(self.index.root),
            "fingerprint": self.index.fingerprint(),
            "init": os.path.abspath(self.init) if self.init else None,
        }
