"""From a command line to a trainer: every check first, then the long work of building.

:func:`plan` reads and checks; it touches no file. :meth:`Plan.start` builds the model, the teacher's table, the
loader and the engine, and makes the run folder.
"""

import argparse
import dataclasses
import difflib
import hashlib
import os
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from d2s.checkpoint.full_model import FullModel
from d2s.checkpoint.restarts import StalledError, count_start, forget_start
from d2s.data.batches import TrainBatches
from d2s.data.stream import StreamBatches
from d2s.losses.objective import Objective
from d2s.model import D2SModel, Teacher, build_word_tokenizer
from d2s.model.config import IdleSetting
from d2s.model.saving import read_config
from d2s.model.tokenizer import WORDS
from d2s.preprocess.text import TextPipeline
from d2s.shards.format.manifest import read_manifest
from d2s.shards.order.permutation import steps_per_epoch
from d2s.shards.read.index import ShardIndex
from d2s.shards.read.stream import is_pattern
from d2s.training import run_folder
from d2s.training.config import TrainConfig, field_names, override
from d2s.training.engine import checkpoint_activations, engine_settings, idle_engine_settings, start_engine
from d2s.training.gradient_cache import check_norms, refuse_batch_norm
from d2s.training.module import TrainingModule
from d2s.training.nonfinite import Origin
from d2s.training.optimizer import build_optimizer
from d2s.training.recipes import RECIPES
from d2s.training.run_log import RunLog
from d2s.training.teacher_table import teacher_table
from d2s.training.trainer import Trainer
from d2s.workers.collectives import run_on_all
from d2s.workers.group import Workers, local_batch, start_workers
from d2s.workers.preemption import Preemption

TOWERS = ("image_encoder", "text_encoder")
_TOKENIZER_ROWS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked run: nothing in it is missing or contradictory, and nothing has been built yet."""

    config: TrainConfig
    data: str
    """What was given as --data: a data set's folder, or a pattern of tars to stream."""
    index: ShardIndex
    """The data set, or where tars are streamed the one to validate on."""
    run: Path | None
    init: Path | None
    resume: bool
    resume_from: Path | None
    world: int

    @property
    def streams(self) -> bool:
        return is_pattern(self.data)

    @property
    def captions(self) -> str:
        """Which captions a training batch brings: the loader's word for it."""
        if self.config.stage == "pretrain":
            return "dense"
        return "both" if self.config.loss.distill_weight else "sparse"

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.items, self.config.batch_size)

    @property
    def items(self) -> int:
        """What an epoch passes over: images, image-caption pairs, or visits of a stream."""
        if self.streams:
            return self.config.samples_per_epoch
        if self.config.stage == "finetune" and self.config.data.sparse == "all":
            return self.index.n_sparse_total("train")
        return len(self.index.rows("train"))

    @property
    def local_batch(self) -> int:
        """Pairs of the global batch on one worker."""
        return self.config.batch_size // self.world

    @property
    def total_steps(self) -> int:
        return self.config.max_steps or self.config.epochs * self.steps_per_epoch

    def build_model(self) -> D2SModel:
        """The model: the towers of `init` where there is one, else with the weights that the towers name."""
        torch.manual_seed(self.config.seed)
        settings = self.config.model
        if self.init:
            # The towers are those of stage 1, with all their settings but whether they learn.
            changes = {name: getattr(settings, name) for name in field_names(settings) - {*TOWERS}}
            saved = read_config(self.init)
            for name in TOWERS:
                freeze = getattr(settings, name).freeze
                changes[name] = dataclasses.replace(getattr(saved, name), freeze=freeze)
            return D2SModel.from_pretrained(self.init, **changes)
        tokenizer = None
        if settings.text_encoder.tokenizer == WORDS:
            split = "val" if self.streams else "train"
            table = read_manifest(self.index.root, columns=["sparse", "dense"], split=split)[:_TOKENIZER_ROWS]
            captions = (text for row in table.to_pylist() for text in [*row["sparse"], *row["dense"]])
            tokenizer = build_word_tokenizer(captions)
        return D2SModel(settings, tokenizer)

    def build_module(self, model: D2SModel) -> TrainingModule:
        """What the engine wraps. Raises ValueError where the model cannot be trained by micro-batches."""
        engine = self.config.engine
        check_norms(model, engine.micro_batch, self.local_batch)
        return TrainingModule(
            model,
            Objective(self.config.loss),
            bf16=engine.precision == "bf16",
            sample_draws=engine.micro_batch > 0,
        )

    def build_batches(self, pipeline: TextPipeline, workers: Workers) -> TrainBatches | StreamBatches:
        """This worker's training batches."""
        config = self.config
        common = {
            "captions": self.captions,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "rank": workers.rank,
            "world": workers.world,
            "dense_text": config.loss.teacher == "online",
        }
        if not self.streams:
            return TrainBatches(self.index, "train", config.data, pipeline, **common)
        samples = config.samples_per_epoch
        return StreamBatches(self.data, config.data, pipeline, samples_per_epoch=samples, **common)

    def start(self, preemption: Preemption) -> Trainer:
        """Builds everything, on all workers together, and restores the newest checkpoint when resuming.

        Raises Preempted, on all of them, where one was asked to stop, and StalledError where a chain of restarts
        does not get further.
        """
        assert self.run is not None
        workers = start_workers()
        with ExitStack() as undo:
            lock = run_folder.claim(self.run) if workers.is_main else None
            if lock is not None:
                undo.callback(os.close, lock)
            # Each worker looked for itself, maybe in a folder that another machine still shows as it was.
            decided = dataclasses.replace(self, resume_from=run_on_all(lambda: self.resume_from)[0])
            try:
                decided._count_start(workers)
                preemption.check()
                trainer = decided._build(workers, preemption, lock)
            except KeyboardInterrupt:
                forget_start(self.run)
                raise
            undo.pop_all()
        return trainer

    def _build(self, workers: Workers, preemption: Preemption, lock: int | None) -> Trainer:
        config = self.config
        model = self.build_model().to(workers.device)
        if config.engine.activation_checkpointing:
            checkpoint_activations(model)
        pipeline = TextPipeline(model.tokenizer, config.data.max_words_dense)
        teacher = self._teacher(model, pipeline, workers, preemption)
        module = self.build_module(model).to(workers.device)
        backbone = [parameter for _, parameter in model.parameter_parts()["backbone"]]
        optimizer = build_optimizer(module, backbone, config.optim)
        settings = self.engine_settings()
        whole = FullModel(model, settings["zero_optimization"]["stage"])
        trainer = Trainer(
            config=config,
            run=self.run,
            workers=workers,
            index=self.index,
            engine=start_engine(module, optimizer, settings),
            whole=whole,
            batches=self.build_batches(pipeline, workers),
            total_steps=self.total_steps,
            teacher=teacher,
            log=None,
            preemption=preemption,
            origin=Origin(module, module.objective, config.nonfinite_limit),
            lock=lock,
        )
        preemption.check()
        if self.resume_from:
            trainer.restore()
        if workers.is_main:
            run_folder.write(self.run, config, self.origin(), self.world)
        trainer.log = RunLog(
            self.run,
            is_main=workers.is_main,
            resume_step=trainer.step,
            total_steps=self.total_steps,
            wandb_project=config.log.wandb,
        )
        return trainer

    def _count_start(self, workers: Workers) -> None:
        """Refuses, on all workers, a start that gets no further than those before it.

        One that finds its run done, with nothing left but to say so, is none.
        """

        def count() -> str:
            done = self.resume_from and self.resume_from.name == f"step-{self.total_steps:08d}"
            if not workers.is_main or (done and (self.run / "last").is_dir()):
                return ""
            if not self.resume:
                forget_start(self.run)
            try:
                count_start(self.run, self.resume_from, self.config.log.max_stalled_restarts)
            except StalledError as error:
                return str(error)
            return ""

        stalled = run_on_all(count)[0]
        if stalled:
            raise StalledError(stalled)

    def engine_settings(self) -> dict[str, Any]:
        """DeepSpeed's settings. Raises ValueError where the user's JSON is none."""
        return engine_settings(self.config.engine, self.local_batch, self.config.optim.grad_clip)

    def origin(self) -> dict[str, Any]:
        """What the run is made from: a resumed run has to come from the same."""
        return {
            "data": self.data,
            "val_data": str(self.index.root),
            "fingerprint": self.index.fingerprint(),
            "init": str(self.init) if self.init else None,
        }

    def _teacher(
        self, model: D2SModel, pipeline: TextPipeline, workers: Workers, preemption: Preemption
    ) -> Any:
        """A frozen copy of the text tower as stage 1 left it, or the table of what it says."""
        if not self.config.loss.distill_weight:
            return None
        teacher = Teacher(model.text_encoder, train_mode=self.config.loss.teacher_train_mode)
        if self.config.loss.teacher == "online":
            return teacher
        with open(self.init / "model.safetensors", "rb") as weights:
            digest = hashlib.file_digest(weights, "sha256").hexdigest()
        return teacher_table(
            self.run / "teacher",
            teacher,
            self.index,
            "train",
            pipeline,
            workers,
            made_from=f"weights {digest}, data {self.index.fingerprint()}",
            poll=preemption.check,
        )


def plan(options: argparse.Namespace, overrides: list[str]) -> Plan:
    """Checks everything that a user can get wrong.

    Raises ValueError, in one line that names the argument or field, the value and the remedy.
    """
    config = override(find_recipe(options.recipe), overrides)
    if options.run is None and not options.dry_run:
        raise ValueError("--run is missing: name the folder that this run writes to")
    init = find_model(options.init) if options.init else None
    if config.loss.distill_weight and init is None:
        raise ValueError(
            f"loss.distill_weight is {config.loss.distill_weight} but there is no teacher: "
            "give --init, the run of the pretrain stage, or set the weight to 0"
        )
    data = _find_data(options)
    index = _open_data(data, options.val_data, config)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_batch(config.batch_size, world)  # raises ValueError where it does not divide
    prepared = Plan(
        config=config,
        data=data,
        index=index,
        run=options.run,
        init=init,
        resume=options.resume,
        resume_from=None,
        world=world,
    )
    assert prepared.steps_per_epoch >= 1  # too large a batch raises ValueError with the numbers
    prepared.engine_settings()
    for line in idle_engine_settings(config.engine):
        warnings.warn(line, IdleSetting, stacklevel=2)
    if config.model.text_mlp_norm == "batch":
        refuse_batch_norm("text_encoder.mlp.norm", config.engine.micro_batch, prepared.local_batch)
    if config.log.wandb and find_spec("wandb") is None:
        raise ValueError("log.wandb is set but wandb is not installed: pip install wandb, or unset it")
    if options.dry_run:
        return prepared
    resume_from = run_folder.check_run(options.run, config, prepared.origin(), resume=options.resume)
    return dataclasses.replace(prepared, resume_from=resume_from)


def find_recipe(name: str) -> TrainConfig:
    """The recipe's configuration. Raises ValueError with the nearest name for an unknown one."""
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.3)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "; --help lists them"
        raise ValueError(f"there is no recipe {name!r}{hint}")
    return dataclasses.replace(RECIPES[name](), recipe=name)


def find_model(path: Path) -> Path:
    """The model folder at `path`: a run's best model, or the folder itself."""
    for candidate in (path / "best", path):
        if (candidate / "model.safetensors").is_file():
            return candidate
    raise ValueError(
        f"--init {path}: neither a run with a best/ model nor a model folder (model.safetensors)"
    )


def _find_data(options: argparse.Namespace) -> str:
    if options.data:
        return options.data
    for folder in (options.run if options.resume else None, options.init):
        data = run_folder.data_of(folder) if folder else None
        if data:
            return data
    raise ValueError("--data is missing: name a folder made by `python -m d2s.shard build`")


def _open_data(data: str, val_data: str | None, config: TrainConfig) -> ShardIndex:
    """The index of the data set, or of --val-data where `data` is a stream; captions and splits checked."""
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


def _check_validation(config: TrainConfig, index: ShardIndex) -> None:
    kind = "dense" if config.stage == "pretrain" else "sparse"
    if len(index.rows("val")) and not index.total("val", kind):
        raise ValueError(
            f"the val split of {index.root} has no {kind} captions, by which stage {config.stage} chooses its best "
            "model: build it with them"
        )


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
