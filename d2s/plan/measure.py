"""A few real steps of a training on this machine, and what they take: the other side of a plan's figures.

`d2s.plan --check` starts one such process for each worker; the first one writes what it measured as JSON.
"""

import dataclasses
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2s.drill import job as drill_job
from d2s.model.presets import shape_of

STEPS = 6
_LIMIT = 900.0


def measure(arguments: list[str], workers: int) -> dict[str, float]:
    """Trains a few steps as train.py would with `arguments`; bytes on the first worker by part, and "samples_per_s".

    Raises ValueError with what a worker said where one failed.
    """
    with tempfile.TemporaryDirectory(prefix="d2s-plan-") as folder:
        out = Path(folder)
        job = drill_job.start_job(
            [*arguments, "--max_steps", str(STEPS)], out / "run", workers, out / "log", script=Path(__file__)
        )
        try:
            if not job.wait(_LIMIT) or any(job.codes()):
                raise ValueError(f"--check: the training failed: {job.complaint()}")
        finally:
            job.end()
        return json.loads((out / "run" / "measured.json").read_text(encoding="utf-8"))


def main(arguments: list[str]) -> None:
    """One worker. `arguments` are train.py's."""
    import deepspeed  # noqa: F401  # its import is no part of what a training takes

    from d2s.training.arguments import parse
    from d2s.training.build import build_trainer
    from d2s.training.checks import check_arguments
    from d2s.workers.preemption import Preemption

    prepared = check_arguments(*parse(arguments))
    towers = {
        name: shape_of(getattr(prepared.config.model, name)) for name in ("image_encoder", "text_encoder")
    }
    model = dataclasses.replace(prepared.config.model, **towers)
    prepared = dataclasses.replace(prepared, config=dataclasses.replace(prepared.config, model=model))
    before = resident()
    trainer = build_trainer(prepared, Preemption())
    measured = steps(trainer)
    measured |= {"resident": resident() - before, "on_cpu": not torch.cuda.is_available()}
    if trainer.workers.is_main:
        (prepared.run / "measured.json").write_text(json.dumps(measured), encoding="utf-8")


def resident() -> int:
    """The most memory that this process has had: on the GPU, or else in RAM; bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def steps(trainer: Any) -> dict[str, float]:
    """Trains STEPS steps and reads off what they hold."""
    module, seconds, kept, grads = trainer.engine.module, [], [], []
    watch = _Kept(module)
    backward = trainer.engine.backward

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = backward(*args, **kwargs)
        grads.append(gradient_bytes(trainer.engine, module))
        return result

    trainer.engine.backward = noted
    trainer.engine.train()
    for number, batch in enumerate(trainer.batches.epoch(0)):
        start = time.monotonic()
        if number == 1:  # counting slows a step down
            with watch:
                trainer.train_step(batch)
            kept.append(watch.most)
        else:
            trainer.train_step(batch)
            seconds.append(time.monotonic() - start)
        trainer.state.step += 1
        if trainer.state.step == STEPS:
            break
    weights = bytes_of(getattr(p, "ds_tensor", p) for p in module.parameters())
    return {
        "weights": weights,
        "gradients": max(grads),
        "optimizer": optimizer_bytes(trainer.engine, module),
        "activations": max(kept),
        "samples_per_s": trainer.config.batch_size / statistics.median(seconds[1:]),
        "tokens": len(trainer.model.tokenizer),
    }


def gradient_bytes(engine: Any, module: torch.nn.Module) -> int:
    """What is there of the gradient after the backward pass: of all weights, or this worker's part of it."""
    parts = [p.grad for p in module.parameters() if p.grad is not None]
    averaged = getattr(engine.optimizer, "averaged_gradients", None) or {}
    parts += [tensor for tensors in averaged.values() for tensor in tensors or [] if tensor is not None]
    flat = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    return bytes_of([*parts, flat] if flat is not None else parts)


def optimizer_bytes(engine: Any, module: torch.nn.Module) -> int:
    """AdamW's moments, and the flat copies of the weights that ZeRO lets it step."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    stepped = [p for group in inner.param_groups for p in group["params"]]
    copies = list(getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])) or stepped
    moments = [
        value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)
    ]
    return bytes_of(t for t in [*copies, *moments] if t.untyped_storage().data_ptr() not in own)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What the storages of some tensors hold, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class _Kept:
    """Counts what each forward pass of a module saves for the backward, parameters left out."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.most = 0
        self._module = module
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        self._handles = [
            self._module.register_forward_pre_hook(self._begin),
            self._module.register_forward_hook(self._stop),
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, *_: object) -> None:
        own = {p.untyped_storage().data_ptr() for p in self._module.parameters()}
        saved = self._saved = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        self._context = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self._context.__enter__()

    def _stop(self, *_: object) -> None:
        self._context.__exit__(None, None, None)
        self.most = max(self.most, sum(self._saved.values()))


if __name__ == "__main__":
    from d2s.workers.group import leave

    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        leave(2, ordered=False)
    leave(0, ordered=True)
