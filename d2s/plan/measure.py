"""Measures memory and speed of a few real training steps on this machine, to check the planned figures.

`measure` runs this file in one process for each worker. The first worker writes its figures to a JSON file.
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

from d2s.common import command
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
    """Trains with `arguments` as train.py does, and stops after STEPS training steps.

    Returns a dictionary. "weights", "gradients", "optimizer", "activations" and "resident" are bytes on the first
    worker. "samples_per_s" is for all workers. "vocabulary" is a number of tokens. "on_cpu" is a bool. Raises
    ValueError with the worker's error message if a worker fails.
    """
    with tempfile.TemporaryDirectory(prefix="d2s-plan-") as folder:
        run = Path(folder) / "run"
        words = ["-m", "d2s.plan.measure", *arguments, "--max_steps", str(STEPS), "--run", str(run)]
        job = start_job(words, workers, Path(folder) / "log")
        try:
            if not job.wait(_TIMEOUT) or any(job.codes()):
                raise ValueError(f"--check: the training failed: {job.error()}")
        finally:
            job.end()
        return json.loads((run / "measured.json").read_text(encoding="utf-8"))


def main(arguments: list[str]) -> None:
    """Trains as one of the workers, with `arguments` of train.py. The first worker writes RUN/measured.json."""
    import deepspeed  # noqa: F401  # imported before the measurement starts, so that its memory is not counted

    spec = check_arguments(*parse(arguments))
    spec = dataclasses.replace(spec, config=by_shape(spec.config))
    before = peak_memory()
    with build_trainer(spec, Preemption()) as trainer:
        measured = take_steps(trainer)
        measured |= {"resident": peak_memory() - before, "on_cpu": not torch.cuda.is_available()}
        if trainer.workers.is_main:
            (spec.run / "measured.json").write_text(json.dumps(measured), encoding="utf-8")


def peak_memory() -> int:
    """Returns the peak number of bytes that this process has used: on the GPU if there is one, else in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def take_steps(trainer: Trainer) -> dict[str, float]:
    """Takes STEPS training steps. Returns the dictionary of `measure` without "resident" and "on_cpu"."""
    engine, module = trainer.engine, trainer.engine.module
    seconds, gradients, saved = [], [], SavedActivations(module)
    engine.train()
    for number, batch in enumerate(trainer.batches.epoch(0)):
        start = time.monotonic()
        with saved if number == 1 else nullcontext():  # only in one training step, because counting is slow
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
    """Returns the bytes of gradients on this worker after the backward pass. ZeRO 2 and 3 keep only a part."""
    parts = [p.grad for p in engine.module.parameters() if p.grad is not None]
    averaged = getattr(engine.optimizer, "averaged_gradients", None) or {}
    parts += [tensor for tensors in averaged.values() for tensor in tensors or [] if tensor is not None]
    flat = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    return storage_bytes([*parts, flat] if flat is not None else parts)


def optimizer_bytes(engine: Any) -> int:
    """Returns the bytes of AdamW's moments and ZeRO's flat copies of the weights on this worker."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    weights = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    updated = [p for group in inner.param_groups for p in group["params"]]
    copies = list(getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])) or updated
    moments = [
        value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)
    ]
    return storage_bytes(t for t in [*copies, *moments] if t.untyped_storage().data_ptr() not in weights)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of the tensors' storages. A storage that several tensors share counts once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


if __name__ == "__main__":
    code = command.run(lambda: main(sys.argv[1:]))
    leave(code, ordered=not code)
