"""Builds a trainer from a checked run: model, teacher, batches, optimizer, engine and run folder."""

import dataclasses
import hashlib
import os
from contextlib import ExitStack

import torch

from d2s.checkpoint.full_model import FullModel
from d2s.checkpoint.restarts import StalledError, count_start, forget_start
from d2s.data.batch import BatchBuilder
from d2s.data.batches import TrainBatches
from d2s.data.damage import Damage
from d2s.data.stream import StreamBatches
from d2s.losses.objective import Objective
from d2s.model import D2SModel, Teacher, build_word_tokenizer
from d2s.model.saving import read_config
from d2s.model.tokenizer import WORDS
from d2s.preprocess.text import TextPipeline
from d2s.shards.format.manifest import read_manifest
from d2s.training import run_folder
from d2s.training.engine import checkpoint_activations, start_engine
from d2s.training.gradient_cache import MicroBatches, check_norms
from d2s.training.module import TrainingModule
from d2s.training.nonfinite import NonFiniteDetector
from d2s.training.optimizer import build_optimizer
from d2s.training.run_log import RunLog
from d2s.training.run_spec import RunSpec
from d2s.training.state import RunState
from d2s.training.step import WholeBatch
from d2s.training.teacher_table import TeacherTable, teacher_table
from d2s.training.trainer import Trainer
from d2s.workers.collectives import run_on_all
from d2s.workers.group import Workers, start_workers
from d2s.workers.preemption import Preemption

TOWERS = ("image_encoder", "text_encoder")
TOKENIZER_IMAGES = 1_000_000
"""The vocabulary of a word tokenizer is built from the captions of at most this many images."""


def build_trainer(spec: RunSpec, preemption: Preemption) -> Trainer:
    """Builds the trainer, and restores the newest checkpoint if the run is resumed. All workers call this together.

    Raises on all workers: Preempted if a worker received a stop signal; StalledError if the run was started too often
    from the same checkpoint without writing a newer checkpoint.
    """
    assert spec.run is not None
    workers = start_workers()
    with ExitStack() as on_failure:
        lock = run_folder.claim(spec.run) if workers.is_main else None
        if lock is not None:
            on_failure.callback(os.close, lock)
        # The first worker decides, because a network file system may show another machine an outdated folder.
        spec = dataclasses.replace(spec, resume_from=run_on_all(lambda: spec.resume_from)[0])
        try:
            _refuse_stalled_restart(spec, workers)
            preemption.check()
            trainer = _build(spec, workers, preemption, lock)
        except KeyboardInterrupt:
            forget_start(spec.run)
            raise
        on_failure.pop_all()
    return trainer


def build_model(spec: RunSpec) -> D2SModel:
    """Builds the model. Loads its towers from the model at `spec.init` if given, else creates them from settings."""
    torch.manual_seed(spec.config.seed)
    settings = spec.config.model
    if spec.init:
        # The towers keep their settings from stage 1, except `freeze`, which this stage decides.
        names = {field.name for field in dataclasses.fields(settings)} - {*TOWERS}
        changes = {name: getattr(settings, name) for name in names}
        saved = read_config(spec.init)
        for name in TOWERS:
            freeze = getattr(settings, name).freeze
            changes[name] = dataclasses.replace(getattr(saved, name), freeze=freeze)
        return D2SModel.from_pretrained(spec.init, **changes)
    tokenizer = None
    if settings.text_encoder.tokenizer == WORDS:
        split = "val" if spec.streams else "train"
        table = read_manifest(spec.index.root, columns=["sparse", "dense"], split=split)[:TOKENIZER_IMAGES]
        captions = (text for row in table.to_pylist() for text in [*row["sparse"], *row["dense"]])
        tokenizer = build_word_tokenizer(captions)
    return D2SModel(settings, tokenizer)


def build_module(spec: RunSpec, model: D2SModel) -> TrainingModule:
    """Returns model and objective as one module.
    Raises ValueError if micro-batches are set, but the model does not allow them; see :func:`check_norms`."""
    engine = spec.config.engine
    check_norms(model, engine.micro_batch, spec.local_batch)
    return TrainingModule(
        model,
        Objective(spec.config.loss),
        bf16=engine.precision == "bf16",
        sample_draws=engine.micro_batch > 0,
    )


def _build(spec: RunSpec, workers: Workers, preemption: Preemption, lock: int | None) -> Trainer:
    config = spec.config
    model = build_model(spec).to(workers.device)
    if config.engine.activation_checkpointing:
        checkpoint_activations(model)
    pipeline = TextPipeline(model.tokenizer, config.data.max_words_dense)
    teacher = _build_teacher(spec, model, pipeline, workers, preemption)
    module = build_module(spec, model).to(workers.device)
    optimizer = build_optimizer(module, model.tower_parameters(), config.optim)
    settings = spec.engine_settings()
    full_model = FullModel(model, settings["zero_optimization"]["stage"])  # before the engine adds its hooks
    engine = start_engine(module, optimizer, settings)
    batches = _build_batches(spec, pipeline, workers)
    detector = NonFiniteDetector(module, module.objective, config.nonfinite_limit)
    computation = WholeBatch(engine, teacher, workers, config.seed)
    if 0 < config.engine.micro_batch < spec.local_batch:
        computation = MicroBatches(
            engine, teacher, workers, config.seed,
            size=config.engine.micro_batch, detector=detector, preemption=preemption,
        )  # fmt: skip
    trainer = Trainer(
        config=config,
        run=spec.run,
        workers=workers,
        index=spec.index,
        engine=engine,
        full_model=full_model,
        batches=batches,
        computation=computation,
        total_steps=spec.total_steps,
        state=RunState(damage=Damage(batches.damaged)),
        preemption=preemption,
        detector=detector,
        lock=lock,
    )
    preemption.check()
    if spec.resume_from:
        trainer.restore()
    if workers.is_main:
        run_folder.write(spec.run, config, spec.origin(), spec.world)
    trainer.log = RunLog(
        spec.run,
        is_main=workers.is_main,
        resume_step=trainer.state.step,
        total_steps=spec.total_steps,
        wandb_project=config.log.wandb,
    )
    return trainer


def _build_batches(spec: RunSpec, pipeline: TextPipeline, workers: Workers) -> TrainBatches | StreamBatches:
    """Returns this worker's training batches."""
    config, with_dense = spec.config, spec.config.loss.teacher == "online"
    builder = BatchBuilder(
        config.data, pipeline, captions=spec.captions, seed=config.seed, dense_text=with_dense
    )
    place = {"batch_size": config.batch_size, "rank": workers.rank, "world": workers.world}
    if not spec.streams:
        return TrainBatches(spec.index, "train", builder, **place)
    return StreamBatches(spec.data, builder, samples_per_epoch=config.samples_per_epoch, **place)


def _build_teacher(
    spec: RunSpec, model: D2SModel, pipeline: TextPipeline, workers: Workers, preemption: Preemption
) -> Teacher | TeacherTable | None:
    """Returns the teacher: a frozen copy of the text tower of stage 1, or a table of its embeddings.
    loss.teacher selects which. Returns None without distillation."""
    loss = spec.config.loss
    if not loss.distill_weight:
        return None
    teacher = Teacher(model.text_encoder, train_mode=loss.teacher_train_mode)
    if loss.teacher == "online":
        return teacher
    with open(spec.init / "model.safetensors", "rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    return teacher_table(
        spec.run / "teacher",
        teacher,
        spec.index,
        "train",
        pipeline,
        workers,
        made_from=f"weights {digest}, data {spec.index.fingerprint()}",
        poll=preemption.check,
    )


def _refuse_stalled_restart(spec: RunSpec, workers: Workers) -> None:
    """Counts this start of the run, unless the run is already finished.

    Raises StalledError, on all workers, if too many starts continued from the same checkpoint.
    """

    def count() -> str:
        last_step = spec.resume_from and spec.resume_from.name == f"step-{spec.total_steps:08d}"
        finished = last_step and (spec.run / "last").is_dir()
        if not workers.is_main or finished:
            return ""
        if not spec.resume:
            forget_start(spec.run)
        try:
            count_start(spec.run, spec.resume_from, spec.config.checkpoint.max_stalled_restarts)
        except StalledError as error:
            return str(error)
        return ""

    reason = run_on_all(count)[0]
    if reason:
        raise StalledError(reason)
