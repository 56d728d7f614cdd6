"""Checks all of a user's arguments, settings and data for a run, before any file is written."""

import argparse
import dataclasses
import os
import warnings
from importlib.util import find_spec
from pathlib import Path

from d2s.losses.table import losses_of
from d2s.model.config import IdleSetting
from d2s.shards.read.index import ShardIndex
from d2s.shards.read.stream import is_pattern
from d2s.training import run_folder
from d2s.training.config import TrainConfig, override
from d2s.training.engine import idle_engine_settings
from d2s.training.gradient_cache import refuse_batch_norm
from d2s.training.recipes import find_recipe
from d2s.training.run_spec import RunSpec
from d2s.workers.group import local_batch


def check_arguments(options: argparse.Namespace, overrides: list[str]) -> RunSpec:
    """Reads and checks the recipe, the overrides and the index of the data. Returns the description of a run.

    options, overrides: as :func:`d2s.training.arguments.parse` returns them.
    Raises ValueError for any mistake. The message names the argument or field, its value and the remedy.
    """
    config = override(find_recipe(options.recipe), overrides)
    if options.run is None and not options.dry_run:
        raise ValueError("--run is missing: name the folder that this run writes to")
    init = _find_model(options.init) if options.init else None
    if config.loss.distill_weight and init is None:
        raise ValueError(
            f"loss.distill_weight is {config.loss.distill_weight} but there is no teacher: "
            "give --init, the run of the pretrain stage, or set the weight to 0"
        )
    data = _find_data(options)
    index = _open_data(data, options.val_data, config)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_batch(config.batch_size, world)  # raises ValueError unless the batch size is a multiple of world
    spec = RunSpec(
        config=config, data=data, index=index, run=options.run, init=init,
        resume=options.resume, resume_from=None, world=world,
    )  # fmt: skip
    _check_negatives(spec)
    assert spec.steps_per_epoch >= 1  # raises ValueError if the batch is larger than the data
    spec.engine_settings()
    for line in idle_engine_settings(config.engine):
        warnings.warn(line, IdleSetting, stacklevel=2)
    if config.model.text_mlp_norm == "batch":
        refuse_batch_norm("text_encoder.mlp.norm", config.engine.micro_batch, spec.local_batch)
    if config.log.wandb and find_spec("wandb") is None:
        raise ValueError("log.wandb is set but wandb is not installed: pip install wandb, or unset it")
    if options.dry_run:
        return spec
    resume_from = run_folder.check_run(options.run, config, spec.origin(), resume=options.resume)
    return dataclasses.replace(spec, resume_from=resume_from)


def _find_model(path: Path) -> Path:
    """Returns path/best if it has a model, or else `path` if it is a model folder. Else raises ValueError."""
    for candidate in (path / "best", path):
        if (candidate / "model.safetensors").is_file():
            return candidate
    raise ValueError(
        f"--init {path}: neither a run with a best/ model nor a model folder (model.safetensors)"
    )


def _find_data(options: argparse.Namespace) -> str:
    """Returns --data, else the data of the run to resume or of --init. Raises ValueError if there is none."""
    if options.data:
        return options.data
    for folder in (options.run if options.resume else None, options.init):
        data = run_folder.data_of(folder) if folder else None
        if data:
            return data
    raise ValueError("--data is missing: name a folder made by `python -m d2s.shard build`")


def _open_data(data: str, val_data: str | None, config: TrainConfig) -> ShardIndex:
    """Opens and checks the index of `data`, or of `val_data` if `data` is a stream of tars."""
    if not is_pattern(data):
        if val_data:
            raise ValueError(
                "--val-data goes with a stream of tars only: an indexed data set has its own val split"
            )
        index = ShardIndex.open(data)
        index.rows("train")
        _check_captions(config, index)
        _check_validation(config, index)
        return index
    if not val_data:
        raise ValueError("--data is a stream of tars: give --val-data, an indexed data set with a val split")
    if not config.samples_per_epoch:
        raise ValueError("--data is a stream of tars, which has no length: give --samples_per_epoch")
    if config.loss.distill_weight and config.loss.teacher == "cached":
        raise ValueError(
            "loss.teacher is 'cached', but a stream's captions have no numbers: set it to 'online'"
        )
    index = ShardIndex.open(val_data)
    _check_validation(config, index)
    return index


def _check_captions(config: TrainConfig, index: ShardIndex) -> None:
    needed = ["dense"] if config.stage == "pretrain" else ["sparse"]
    if config.loss.distill_weight:
        needed.append("dense")
    for kind in needed:
        missing, first = index.without("train", kind)
        if missing:
            raise ValueError(
                f"{missing} images of the train split have no {kind} caption, the first is "
                f"{index.keys([first])[0]}: stage {config.stage} needs one for each"
            )


def _check_negatives(spec: RunSpec) -> None:
    if not any(loss.compares_pairs for loss in losses_of(spec.config.loss)):
        return
    why = "the loss compares a pair with the other images of its batch, and there are none"
    if not spec.streams and len(spec.index.rows("train")) == 1:
        raise ValueError(f"the train split of {spec.data} has 1 image: {why}; build it with 2 or more")
    if spec.config.batch_size == 1:
        raise ValueError(f"batch_size is 1: {why}; raise it to 2 or more")


def _check_validation(config: TrainConfig, index: ShardIndex) -> None:
    kind = "dense" if config.stage == "pretrain" else "sparse"
    if len(index.rows("val")) and not index.total("val", kind):
        raise ValueError(
            f"the val split of {index.root} has no {kind} captions, which stage {config.stage} needs to choose its "
            "best model: build it with them"
        )
