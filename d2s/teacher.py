"""The teacher's embeddings of the training split's dense captions: computed once, stored in the run.

runs/<name>/teacher/dense.f32     float32, one row a dense caption of the split, in the index's order
runs/<name>/teacher/teacher.json  what made it: written last, so a half-made table is never used
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2s.data import eval_texts
from d2s.distributed import Workers, barrier
from d2s.model import Teacher
from d2s.shards.files import write_json
from d2s.shards.index import ShardIndex
from d2s.text import TextPipeline


class TeacherTable:
    """Embeddings of the dense captions of one split, memory-mapped.

    rows(dense_index): dense_index (B,) int64 numbers captions as the index does (`dense_start[row] + j`);
    returns (B, D) float32.
    """

    def __init__(self, path: Path, first: int, width: int) -> None:
        self._table = np.memmap(path, np.float32, mode="r").reshape(-1, width)
        self._first = first

    def rows(self, dense_index: Tensor) -> Tensor:
        return torch.from_numpy(self._table[dense_index.cpu().numpy() - self._first])


def teacher_table(
    folder: Path,
    teacher: Teacher,
    index: ShardIndex,
    split: str,
    pipeline: TextPipeline,
    workers: Workers,
    *,
    made_from: str,
    poll: Callable[[], None] | None = None,
    batch_size: int = 128,
) -> TeacherTable:
    """Opens the stored table, or computes it first, each worker its share.

    made_from: names the teacher (a digest of its weights); a table of another teacher or split is computed anew.
    poll: called before each batch, on all workers alike; may raise, and leaves no table then.
    """
    first, count = int(index.column("dense_start")[index.rows(split).start]), index.total(split, "dense")
    width = teacher.text_encoder.linear.out_features
    path, marker = folder / "dense.f32", folder / "teacher.json"
    description = {"teacher": made_from, "split": split, "captions": count, "width": width}
    if not marker.is_file() or json.loads(marker.read_text(encoding="utf-8")) != description:
        if workers.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            marker.unlink(missing_ok=True)
            with open(path, "wb") as file:
                file.truncate(count * width * 4)
        barrier()
        table = np.memmap(path, np.float32, mode="r+").reshape(count, width)
        with torch.no_grad():
            # Training replaces a damaged sample by another one, whose row is asked for in its place.
            for numbers, _, ids, mask, valid in eval_texts(
                index, split, pipeline, "dense", batch_size, workers.rank, workers.world, skip_damaged=True
            ):
                if poll:
                    poll()
                made = teacher(ids.to(workers.device), mask.to(workers.device)).float().cpu()
                table[numbers[valid].numpy()] = made[valid].numpy()
        table.flush()
        barrier()
        if workers.is_main:
            write_json(marker, description)
        barrier()
    return TeacherTable(path, first, width)
