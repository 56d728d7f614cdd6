"""Runs many cases in one group of workers; test_zero_stages.py starts `main` in each of them.

A case: a new run, or one that goes on from a copy of another's checkpoint, some steps, and a checkpoint if asked.
"""

import argparse
import hashlib
import json
import resource
import shutil
from pathlib import Path

from d2s.training.build import build_trainer
from d2s.training.checks import check_arguments
from d2s.training.optimizer import lr_factor, set_learning_rate
from d2s.training.trainer import Trainer
from d2s.workers.collectives import barrier
from d2s.workers.group import leave, start_workers
from d2s.workers.preemption import Preemption

# Without dropout inside of the towers a batch is the same on any number of workers.
COMMON = (
    "--batch_size 8 --max_steps 4 --model.width 16 --data.image_size 32 --model.image_size 32 --optim.warmup_steps 0 "
    "--data.loader_workers 0 --model.text_dropout 0 --checkpoint.max_stalled_restarts 0"
).split()


def start(case: dict, data: str, is_main: bool) -> Trainer:
    run = Path(case["run"])
    if case.get("from") and is_main:
        shutil.copytree(case["from"], run, ignore=shutil.ignore_patterns(".lock"))
    barrier()
    options = argparse.Namespace(
        recipe="scenes_small_pretrain", data=data, val_data=None, run=run, init=None,
        resume=bool(case.get("from")), dry_run=False,
    )  # fmt: skip
    spec = check_arguments(options, [*COMMON, *case["overrides"]])
    barrier()  # as where the workers have yet to meet: a started run's folder is no longer empty
    return build_trainer(spec, Preemption())


def digest(trainer: Trainer) -> str:
    """Of all weights, as evaluation and export see them."""
    with trainer.full_model.gathered() as model:
        state = sorted(model.state_dict().items())
        return hashlib.sha256(b"".join(value.numpy().tobytes() for _, value in state)).hexdigest()


def save(trainer: Trainer, full: int | None) -> dict:
    """Saves; what all workers say, first, where the disk of worker `full` is."""
    if full is None:
        trainer.save()
        return {}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if trainer.workers.rank == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        trainer.save()
    except ValueError as error:
        return {"refused": str(error)}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return {}


def run_case(case: dict, data: str, is_main: bool) -> dict:
    trainer = start(case, data, is_main)
    losses, result = [], {}
    with trainer:
        trainer.engine.train()
        for batch in trainer.batches.epoch(0, trainer.state.step):
            factor = lr_factor(trainer.config.optim, trainer.state.step, 6, 4)
            set_learning_rate(trainer.engine.optimizer, factor)
            losses.append(trainer.train_step(batch).losses[0].item())
            trainer.state.step += 1
            if trainer.state.step == case.get("save"):
                result |= save(trainer, case.get("full"))
            if trainer.state.step == case["until"]:
                break
        result |= {"losses": losses, "weights": digest(trainer)}
        if case.get("evaluate"):
            with trainer.full_model.gathered() as model:
                result["rsum"] = trainer.evaluate(model).dense.rsum
            trainer.engine.train()
            result["after"] = trainer.train_step(next(trainer.batches.epoch(0, 0))).losses[0].item()
    return result


def main(cases: Path, out: Path) -> None:
    workers = start_workers()
    given = json.loads(cases.read_text())
    results = {}
    for case in given["cases"]:
        results[Path(case["run"]).name] = run_case(case, given["data"], workers.is_main)
    if workers.is_main:
        out.write_text(json.dumps(results))
    leave(0, ordered=True)
