"""Describes a run: the user's arguments and settings, and numbers computed from them."""

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
    """Describes a run whose arguments :func:`d2s.training.checks.check_arguments` has checked."""

    config: TrainConfig
    data: str
    """The --data argument: the folder of a data set, or a URL pattern of tars to stream."""
    index: ShardIndex
    """Index of the data set. If `data` is a stream, index of the data set to validate on."""
    run: Path | None
    """The run folder; None for a dry run without --run."""
    init: Path | None
    """The folder of the stage-1 model to start from, or None."""
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
        """Which captions a training batch contains: sparse, dense or both."""
        if self.config.stage == "pretrain":
            return "dense"
        return "both" if self.config.loss.distill_weight else "sparse"

    @property
    def items(self) -> int:
        """How many items an epoch has: images, pairs of an image and a sparse caption, or samples of a stream."""
        if self.streams:
            return self.config.samples_per_epoch
        if self.config.stage == "finetune" and self.config.data.sparse == "all":
            return self.index.n_sparse_total("train")
        return len(self.index.rows("train"))

    @property
    def steps_per_epoch(self) -> int:
        """Number of training steps in an epoch. Raises ValueError if the batch is larger than the data."""
        return steps_per_epoch(self.items, self.config.batch_size)

    @property
    def total_steps(self) -> int:
        """Number of training steps in the whole run."""
        return self.config.max_steps or self.config.epochs * self.steps_per_epoch

    @property
    def local_batch(self) -> int:
        """Number of pairs of the global batch that each worker gets."""
        return self.config.batch_size // self.world

    def engine_settings(self) -> dict[str, Any]:
        """Returns DeepSpeed's settings. Raises ValueError if the user's DeepSpeed JSON has a mistake."""
        return engine_settings(self.config.engine, self.local_batch, self.config.optim.grad_clip)

    def origin(self) -> dict[str, Any]:
        """Returns the data, its fingerprint and the initial model. A resumed run must have the same values.

        Folders are absolute, so that the run can be resumed from another working directory.
        """
        return {
            "data": self.data if self.streams else os.path.abspath(self.data),
            "val_data": os.path.abspath(self.index.root),
            "fingerprint": self.index.fingerprint(),
            "init": os.path.abspath(self.init) if self.init else None,
        }
