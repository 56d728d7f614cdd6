"""Trains a few real steps on this machine and measures what they take, to compare with the planned figures.

`measure` starts this file as one process for each worker; the first worker writes its figures as JSON.
"""

import dataclasses
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2s.common.text import one_line
from d2s.plan.activations import SavedActivations
from d2s.plan.sizes import by_shape
from d2s.training.arguments import parse
from d2s.training.build import build_trainer
from d2s.training.checks import check_arguments
from d2s.training.trainer import Trainer
from d2s.workers.group import leave
from d2s.workers.local_job import start_job
from d2s.workers.preemption import Preemption

STEPS = 6
_TIMEOUT = 900.0


def measure(arguments: list[str], workers: int) -> dict[str, float]:
    """Trains STEPS steps of the training that train.py would do with `arguments`.

    Returns bytes on the first worker by part ("weights", "gradients", "optimizer", "activations", "resident"),
    "samples_per_s" over all workers, "vocabulary" (its size), and "on_cpu". Raises ValueError with a worker's own
    message where one failed.
    """
    with tempfile.TemporaryDirectory(prefix="d2s-plan-") as folder:
        run = Path(folder) / "run"
        command = ["-m", "d2s.plan.measure", *arguments, "--max_steps", str(STEPS), "--run", str(run)]
        job = start_job(command, workers, Path(folder) / "log")
        try:
            if not job.wait(_TIMEOUT) or any(job.codes()):
                raise ValueError(f"--check: the training failed: {job.error()}")
        finally:
            job.end()
        return json.loads((run / "measured.json").read_text(encoding="utf-8"))


def main(arguments: list[str]) -> None:
    """One worker's part. `arguments` are train.py's."""
    import deepspeed  # noqa: F401  # importing it takes memory that is not the training's

    spec = check_arguments(*parse(arguments))
    spec = dataclasses.replace(spec, config=by_shape(spec.config))
    before = peak_memory()
    with build_trainer(spec, Preemption()) as trainer:
        measured = take_steps(trainer)
        measured |= {"resident": peak_memory() - before, "on_cpu": not torch.cuda.is_available()}
        if trainer.workers.is_main:
            (spec.run / "measured.json").write_text(json.dumps(measured), encoding="utf-8")


def peak_memory() -> int:
    """The most bytes that this process has used so far, on the GPU or else in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def take_steps(trainer: Trainer) -> dict[str, float]:
    """Trains STEPS steps and returns the figures of `measure`."""
    engine, module = trainer.engine, trainer.engine.module
    seconds, gradients, saved = [], [], SavedActivations(module)
    engine.train()
    for number, batch in enumerate(trainer.batches.epoch(0)):
        start = time.monotonic()
        with saved if number == 1 else nullcontext():  # counting slows a step down
            losses = trainer.computation.forward(batch, number, 1.0)
            trainer.computation.backward(losses[0])
        gradients.append(gradient_bytes(engine))
        engine.step()
        seconds.append(time.monotonic() - start)
        if len(seconds) == STEPS:
            break
    return {
        "weights": storage_bytes(getattr(p, "ds_tensor", p) for p in module.parameters()),
        "gradients": max(gradients),
        "optimizer": optimizer_bytes(engine),
        "activations": saved.most,
        "samples_per_s": trainer.config.batch_size / statistics.median(seconds[2:]),
        "vocabulary": len(trainer.model.tokenizer),
    }


def gradient_bytes(engine: Any) -> int:
    """Bytes of the gradient after the backward pass: of all weights, or of this worker's part of them."""
    parts = [p.grad for p in engine.module.parameters() if p.grad is not None]
    averaged = getattr(engine.optimizer, "averaged_gradients", None) or {}
    parts += [tensor for tensors in averaged.values() for tensor in tensors or [] if tensor is not None]
    flat = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    return storage_bytes([*parts, flat] if flat is not None else parts)


def optimizer_bytes(engine: Any) -> int:
    """Bytes of AdamW's moments, and of the flat copies of the weights that ZeRO updates."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    weights = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    updated = [p for group in inner.param_groups for p in group["params"]]
    copies = list(getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])) or updated
    moments = [
        value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)
    ]
    return storage_bytes(t for t in [*copies, *moments] if t.untyped_storage().data_ptr() not in weights)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages; one that several tensors share counts once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        leave(2, ordered=False)
    leave(0, ordered=True)
