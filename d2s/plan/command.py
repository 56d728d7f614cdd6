"""What a training will take: `python -m d2s.plan RECIPE --gpus 4 --memory 80 [--throughput 900] [--field value ...]`.

Memory a worker by part for each ZeRO stage, bytes that a worker sends in a step, the largest batch that fits, and the
time of an epoch. No GPU is needed and no data: the model is built with random weights on the CPU. `--check` trains
a few real steps on this machine and prints what they took beside what was planned.
"""

import argparse
import dataclasses
import math
import tempfile
from pathlib import Path

from d2s.common import command
from d2s.common.command import positive
from d2s.shards.order.permutation import steps_per_epoch
from d2s.training.config import TrainConfig

GIB, MIB = 2**30, 2**20
RESERVE = 0.1
"""Share of the memory that stays free: the backward pass's own work, the allocator's slack, the device's context."""
# Training images and sparse captions where no --data is given: Karpathy's splits, and what `make demo` builds.
KNOWN = {
    "f30k": (29_000, 145_000),
    "coco": (113_287, 566_747),
    "flickr8k": (6_000, 30_000),
    "scenes": (4_000, 4_000),
}
WORDS = {"scenes": 100}
_PAPER_WORDS = 30_522


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked, checked."""

    config: TrainConfig
    workers: int
    room: int
    """Bytes a worker."""
    items: int
    """What an epoch passes over."""
    source: str
    """Where `items` comes from."""
    words: int
    bucket: int


def request(options: argparse.Namespace, overrides: list[str]) -> Request:
    """Raises ValueError, in one line, for an unknown recipe or field, and for what does not fit together."""
    from d2s.plan.estimate import by_shape
    from d2s.training.config import override
    from d2s.training.engine import bucket_size, engine_settings
    from d2s.training.recipes import find_recipe
    from d2s.workers.group import local_batch

    config = by_shape(override(find_recipe(options.recipe), overrides))
    local = local_batch(config.batch_size, options.gpus)
    if not 0 < options.memory * GIB < math.inf:
        raise ValueError(f"--memory {options.memory:g}: give the memory of a GPU in GiB, a number above 0")
    if options.throughput is not None and not 0 < options.throughput < math.inf:
        raise ValueError(f"--throughput {options.throughput:g}: give pairs a second over all GPUs, above 0")
    items, source, words = _data(config, options)
    try:
        steps_per_epoch(items, config.batch_size)
    except ValueError as error:  # as the training would
        raise ValueError(f"{error} ({source})") from error
    settings = engine_settings(config.engine, local, config.optim.grad_clip)
    return Request(
        config=config, workers=options.gpus, room=int(options.memory * GIB), items=items, source=source,
        words=words, bucket=bucket_size(settings),
    )  # fmt: skip


def _data(config: TrainConfig, options: argparse.Namespace) -> tuple[int, str, int]:
    """Items an epoch, where that is from, and the pieces of a vocabulary made from captions."""
    pairs = config.stage == "finetune" and config.data.sparse == "all"
    family = options.recipe.split("_")[0]
    if options.data is None:
        images, captions = KNOWN[family]
        what = f"{captions:,} image-caption pairs" if pairs else f"{images:,} images"
        return (
            captions if pairs else images,
            f"{what}, the usual size of {family}",
            WORDS.get(family, _PAPER_WORDS),
        )
    from d2s.model import build_word_tokenizer
    from d2s.shards.format.manifest import read_manifest
    from d2s.shards.read.index import ShardIndex

    index = ShardIndex.open(options.data)
    table = read_manifest(index.root, columns=["sparse", "dense"], split="train").to_pylist()
    words = len(build_word_tokenizer(text for row in table for text in [*row["sparse"], *row["dense"]]))
    items = index.n_sparse_total("train") if pairs else len(index.rows("train"))
    return items, f"{items:,} {'image-caption pairs' if pairs else 'images'} of {options.data}", words


def table(names: tuple[str, ...], columns: dict[str, dict[str, int]], unit: int) -> list[str]:
    """Lines of numbers in `unit`, one for each name, and their sum."""
    lines = ["  " + f"{'':<16}" + "".join(f"{title:>10}" for title in columns)]
    rows = {name: [column[name] for column in columns.values()] for name in names}
    rows["total"] = [sum(column.values()) for column in columns.values()]
    for name, values in rows.items():
        lines.append(f"  {name:<16}" + "".join(f"{value / unit:>10,.2f}" for value in values))
    return lines


def describe(asked: Request, throughput: float | None) -> str:
    """The whole text."""
    from d2s.plan.estimate import PARTS, STAGES, largest_batch, measure_sizes, memory, traffic

    config, workers, batch = asked.config, asked.workers, asked.config.batch_size
    sizes = measure_sizes(config, asked.words, batch // workers)
    stages = {f"ZeRO {stage}": stage for stage in STAGES}
    room = int(asked.room * (1 - RESERVE))
    parts = {t: memory(config, sizes, workers, s, batch, asked.bucket) for t, s in stages.items()}
    sent = {t: traffic(config, sizes, workers, s, batch) for t, s in stages.items()}
    unit, name = (GIB, "GiB") if sum(parts["ZeRO 0"].values()) > GIB else (MIB, "MiB")
    fits = "".join(f"{'yes' if sum(part.values()) <= room else 'no':>10}" for part in parts.values())
    most = "".join(
        f"{largest_batch(config, sizes, workers, s, room, asked.bucket):>10,}" for s in stages.values()
    )
    lines = [
        f"{config.recipe}: {sizes.every:,} parameters, {sizes.learned:,} learned; "
        f"batch {batch} on {workers} workers, {batch // workers} each; {config.engine.precision}",
        "",
        f"memory a worker, {name}",
        *table(PARTS, parts, unit),
        f"  {f'fits {asked.room / GIB:g} GiB':<16}{fits}",
        f"  {'largest batch':<16}{most}",
        f"  ({RESERVE:.0%} of the memory are left to the backward pass's own work, the allocator and the device)",
        "",
        "sent by a worker in a step, MiB",
        *table(tuple(next(iter(sent.values()))), sent, MIB),
        "",
        f"an epoch         {asked.source}: {steps_per_epoch(asked.items, batch):,} steps",
    ]
    if throughput:
        hours = asked.items / throughput / 3600
        epochs = config.max_steps * batch / asked.items if config.max_steps else config.epochs
        lines.append(
            f"time             {hours * 60:,.1f} minutes an epoch at {throughput:,.0f} pairs/s over all workers, "
            f"{hours * epochs:,.1f} hours for {epochs:.3g} epochs"
        )
    else:
        lines.append(
            "time             give --throughput PAIRS_PER_S, or --check to measure it on this machine"
        )
    return "\n".join(lines)


def check(asked: Request, options: argparse.Namespace, overrides: list[str]) -> float:
    """Trains a few steps, prints them beside the plan for the configured ZeRO stage; returns pairs a second."""
    from d2s.plan.estimate import measure_sizes, memory
    from d2s.plan.measure import STEPS, measure

    with tempfile.TemporaryDirectory(prefix="d2s-plan-") as folder:
        data = options.data or _scenes(Path(folder) / "data", asked.config)
        measured = measure([options.recipe, "--data", str(data), *overrides], asked.workers)
    stage, batch = asked.config.engine.zero_stage, asked.config.batch_size
    sizes = measure_sizes(asked.config, int(measured["tokens"]), batch // asked.workers)
    planned = memory(asked.config, sizes, asked.workers, stage, batch, asked.bucket)
    print(f"checked on this machine: {STEPS} steps of {asked.workers} workers, ZeRO {stage}")
    print(f"  {'':<16}{'planned':>10}{'measured':>10}      off   MiB")
    for name in ("weights", "gradients", "optimizer", "activations"):
        print(_beside(name, planned[name], measured[name]))
    untouched = (
        planned["buckets"] if measured["on_cpu"] else 0
    )  # memory that nobody writes to is never resident
    print(_beside("resident", sum(planned.values()) - untouched, measured["resident"]))
    print("  (resident: growth of the process at its highest, backward pass and loader included)\n")
    return measured["samples_per_s"]


def _beside(name: str, planned: float, measured: float) -> str:
    off = f"{(planned - measured) / measured:>+8.1%}" if measured else ""
    return f"  {name:<16}{planned / MIB:>10.1f}{measured / MIB:>10.1f} {off}"


def _scenes(folder: Path, config: TrainConfig) -> Path:
    from d2s.shards.cli import main as shard

    count = 8 * config.batch_size
    arguments = (
        f"build --source scenes --count train={count},val=8 --size {config.data.image_size} --out {folder}"
    )
    if shard(arguments.split()):
        raise ValueError(f"the scenes for --check could not be built in {folder}: give --data")
    return folder


def parser() -> command.Parser:
    parser = command.Parser(
        prog="python -m d2s.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further arguments are the configuration's: --batch_size 4096 --engine.micro_batch 64.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="as of train.py")
    add("--gpus", type=positive, default=1, metavar="N", help="workers (default: 1)")
    add("--memory", type=float, default=80.0, metavar="GB", help="of each, in GiB (default: 80)")
    add("--throughput", type=float, metavar="PAIRS_PER_S", help="measured or hoped for, over all GPUs")
    add("--data", metavar="DIR", help="data set (default: the usual size of the recipe's)")
    add(
        "--check",
        action="store_true",
        help="train a few steps here and compare; made-up scenes without --data",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line of what is wrong."""
    options, overrides = parser().parse_known_args(argv)

    def work() -> None:
        asked, throughput = request(options, overrides), options.throughput
        if options.check:
            measured = check(asked, options, overrides)
            throughput = throughput or measured
        print(describe(asked, throughput))

    return command.run(work)
