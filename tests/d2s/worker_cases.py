"""Gradients of a tiny model through the engine, for any number of workers, ZeRO stage and micro-batch."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import forked
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from model_towers import BERT, VISION, tiny_config
from torch import Tensor

from d2s.data.batch import Batch
from d2s.losses.objective import LossConfig, Objective
from d2s.model import D2SModel, DecoderConfig, TowerConfig, build_word_tokenizer
from d2s.training.gradient_cache import MicroBatches
from d2s.training.module import TrainingModule
from d2s.training.teacher_table import TeacherTable
from d2s.workers.group import Workers

PAIRS, LENGTH, WIDTH = 16, 9, 16
HINGE, DISTILL = LossConfig(align="hinge"), LossConfig(align="infonce", distill_weight=64.0)
RING = LossConfig(align="infonce", exchange="ring")
CASES: dict[str, dict[str, tuple[LossConfig, float]]] = {
    "pretrain": {
        "hinge sum": (HINGE, 0.3),
        "hinge max": (HINGE, 1.0),
        "hinge max, ring": (dataclasses.replace(HINGE, exchange="ring"), 1.0),
        "infonce": (LossConfig(align="infonce"), 1.0),
        "infonce, ring": (RING, 1.0),
        "sigmoid": (LossConfig(align="sigmoid", logit_bias=-3.0), 1.0),
    },
    "finetune": {
        kind: (dataclasses.replace(DISTILL, distill=kind), 1.0)
        for kind in ("cosine", "l1", "l2", "relational")
    },
}
"""Loss and warm-up by stage and name. Their order leaves no parameter without a gradient that had one before:
ZeRO 3 would tell the old one."""


def build(stage: str, *, dropout: bool = False, vision: str = "vit", norm: str = "layer") -> TrainingModule:
    """The training module of a stage, the same at each call, in training mode. dropout: that inside the towers."""
    rates = {} if dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    extra = {**rates, "num_hidden_layers": 1} if vision == "vit" else {}
    torch.manual_seed(3)
    config = tiny_config(
        width=WIDTH,
        image_encoder=TowerConfig(config={**VISION[vision], **extra}, pretrained=False),
        text_encoder=TowerConfig(
            config={**BERT, **rates, "num_hidden_layers": 1}, pretrained=False, tokenizer="words"
        ),
        decoder=DecoderConfig(tokens=4, depth=1, heads=2) if stage == "finetune" else None,
        text_mlp_norm=norm,
    )
    words = [" ".join(f"word{number}" for number in range(40))]
    model = D2SModel(config, build_word_tokenizer(words, min_count=1))
    # With a bias and a scale of its own: the cases below exchange the configuration only.
    objective = Objective(LossConfig(align="sigmoid", logit_bias=-3.0))
    return TrainingModule(model, objective, bf16=False, sample_draws=True).train()


def pairs() -> tuple[Batch, Tensor]:
    """The global batch, and the teacher's embeddings (N, D); some images meet twice or more."""
    draw = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, LENGTH + 1, (PAIRS, 1), generator=draw)
    none = torch.full((PAIRS,), -1)
    batch = Batch(
        images=torch.randint(0, 256, (PAIRS, 3, 32, 32), dtype=torch.uint8, generator=draw),
        text_ids=torch.randint(5, 40, (PAIRS, LENGTH), generator=draw),
        text_mask=torch.arange(LENGTH) < lengths,
        image_ids=torch.arange(PAIRS) * 5 % 11,
        samples=none,
        dense_index=none,
        draw_seeds=torch.randint(-(2**62), 2**62, (PAIRS,), generator=draw),
    )
    return batch, torch.randn(PAIRS, WIDTH, generator=draw)


def set_case(module: TrainingModule, stage: str, name: str) -> float:
    """Gives the objective the loss of a case, and keeps its parameters; returns the warm-up."""
    config, warmup = CASES[stage][name]
    other = Objective(config)
    for part in ("config", "alignment", "distillation"):
        setattr(module.objective, part, getattr(other, part))
    return warmup


def gradients(module: TrainingModule) -> dict[str, Tensor]:
    """Every parameter's gradient by name, whole, wherever the engine keeps it; zero where there is none."""
    from deepspeed.utils import safe_get_full_grad

    found = {}
    for name, parameter in module.named_parameters():
        grad = safe_get_full_grad(parameter)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        found[name] = torch.zeros(shape) if grad is None else grad.detach().cpu().clone().view(shape)
    return found


class TeacherRows(TeacherTable):
    """A teacher's table in memory: row i is the embedding of dense caption i."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def rows(self, dense_index: Tensor) -> Tensor:
        return self._rows[dense_index]


def micro_batches(
    engine, teacher: Tensor | None, size: int, world: int = 1, check=lambda: None
) -> MicroBatches:
    """Micro-batches of `size` pairs without loader, detector and signals; `check` is called before each."""
    return MicroBatches(
        engine,
        None if teacher is None else TeacherRows(teacher),
        Workers(rank=0, world=world, device=torch.device("cpu")),
        0,
        size=size,
        detector=SimpleNamespace(inspect=lambda *embeddings: None),
        preemption=SimpleNamespace(check=check),
    )


def losses_and_backward(engine, stage: str, name: str, size: int) -> Tensor:
    """One forward and backward of this worker's rows, by micro-batches of `size` pairs (0: all at once).

    Returns the loss over all workers, 0-dim.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    batch, teacher = pairs()
    first, local = rank * PAIRS // world, PAIRS // world
    batch, teacher = batch.rows(first, first + local), teacher[first : first + local]
    batch.dense_index = torch.arange(local)
    warmup = set_case(engine.module, stage, name)
    if size:
        computation = micro_batches(engine, teacher, size, world)
        total = computation.forward(batch, 0, warmup)[0]
        computation.backward(total)
    else:
        engine.set_gradient_accumulation_boundary(True)
        torch.manual_seed(0)
        total = engine(batch, warmup, teacher)[0]
        engine.backward(total * world)
    total = total.detach().clone()
    dist.all_reduce(total)
    return total


def start(module: TrainingModule, zero: int, lr: float = 0.0):
    """The engine of ZeRO stage `zero` around a module, with plain SGD, which shows gradients as they are."""
    from d2s.training.engine import EngineConfig, engine_settings, start_engine

    settings = engine_settings(EngineConfig(precision="fp32", zero_stage=zero), 1, 0.0)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=lr)
    return start_engine(module, optimizer, settings)


def run(function, world: int, folder: Path, *arguments: object) -> dict:
    """What `function(*arguments)` returns on worker 0 of `world` processes."""
    # What a test has set; the workers inherit the environment of the process that they are forked from.
    environment = {name: text for name, text in os.environ.items() if name.startswith("D2S_")}
    forked.context()
    mp.start_processes(
        _worker,
        args=(world, str(folder), environment, function, arguments),
        nprocs=world,
        start_method="forkserver",
    )
    return torch.load(folder / f"of{world}.pt")


def _worker(
    rank: int, world: int, folder: str, environment: dict[str, str], function, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, f"store{world}"), world)
    os.environ.update(environment, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    results = function(*arguments)
    if rank == 0:
        torch.save(results, os.path.join(folder, f"of{world}.pt"))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def all_cases() -> Iterator[tuple[str, str]]:
    """(stage, name) of every case."""
    for stage, cases in CASES.items():
        for name in cases:
            yield stage, name
