"""Builds the tables that `python -m d2s.plan` prints."""

from collections.abc import Sequence

from d2s.plan.memory import PARTS, largest_batch, memory
from d2s.plan.request import GIB, Request
from d2s.plan.sizes import measure_sizes
from d2s.plan.traffic import traffic
from d2s.shards.order.permutation import steps_per_epoch

MIB = 2**20
STAGES = (0, 1, 2, 3)
RESERVE = 0.1
"""Fraction of the memory that is left free for temporary tensors of the backward pass, allocator and device."""


def describe(request: Request, throughput: float | None) -> str:
    """Returns the text of the plan: memory, largest batch and traffic by ZeRO stage, and the time of an epoch.

    throughput: pairs per second over all workers, or None if it is unknown.
    """
    config, workers, batch = request.config, request.workers, request.config.batch_size
    sizes = measure_sizes(config, request.vocabulary, request.local_batch)
    usable = int(request.memory * (1 - RESERVE))
    parts = [memory(config, sizes, workers, stage, batch, request.bucket) for stage in STAGES]
    sent = [traffic(config, sizes, workers, stage, batch) for stage in STAGES]
    unit, unit_name = (GIB, "GiB") if sum(parts[0].values()) > GIB else (MIB, "MiB")
    fits = ["yes" if sum(part.values()) <= usable else "no" for part in parts]
    most = [largest_batch(config, sizes, workers, stage, usable, request.bucket) for stage in STAGES]
    lines = [
        f"{config.recipe}: {sizes.parameters:,} parameters, {sizes.learned:,} learned; "
        f"batch {batch} on {workers} workers, {batch // workers} each; {config.engine.precision}",
        "",
        f"memory a worker, {unit_name}",
        *_table(PARTS, parts, unit),
        _row(f"fits {request.memory / GIB:g} GiB", fits),
        _row("largest batch", [f"{size:,}" for size in most]),
        f"  ({RESERVE:.0%} of the memory are left to the backward pass's own work, the allocator and the device)",
        "",
        "sent by a worker in a step, MiB",
        *_table(tuple(sent[0]), sent, MIB),
        "",
        f"an epoch         {request.items_text}: {steps_per_epoch(request.items, batch):,} steps",
    ]
    if throughput:
        hours = request.items / throughput / 3600
        epochs = config.max_steps * batch / request.items if config.max_steps else config.epochs
        lines.append(
            f"time             {hours * 60:,.1f} minutes an epoch at {throughput:,.0f} pairs/s over all workers, "
            f"{hours * epochs:,.1f} hours for {epochs:.3g} epochs"
        )
    else:
        lines.append(
            "time             give --throughput PAIRS_PER_S, or --check to measure it on this machine"
        )
    return "\n".join(lines)


def compare(request: Request, measured: dict[str, float], steps: int) -> str:
    """Returns a table of planned and measured figures. `measure` took `measured` from `steps` training steps."""
    stage = request.config.engine.zero_stage
    sizes = measure_sizes(request.config, int(measured["vocabulary"]), request.local_batch)
    planned = memory(request.config, sizes, request.workers, stage, request.config.batch_size, request.bucket)
    # On a CPU nothing is written to the buckets. Memory becomes resident only when something is written to it.
    untouched = planned["buckets"] if measured["on_cpu"] else 0
    planned["resident"] = sum(planned.values()) - untouched
    lines = [
        f"checked on this machine: {steps} steps of {request.workers} workers, ZeRO {stage}",
        f"  {'':<16}{'planned':>10}{'measured':>10}      off   MiB",
    ]
    for name in ("weights", "gradients", "optimizer", "activations", "resident"):
        ours, real = planned[name], measured[name]
        off = f"{(ours - real) / real:>+8.1%}" if real else ""
        lines.append(f"  {name:<16}{ours / MIB:>10.1f}{real / MIB:>10.1f} {off}")
    lines.append("  (resident: growth of the process at its highest, backward pass and loader included)\n")
    return "\n".join(lines)


def _table(names: Sequence[str], columns: list[dict[str, int]], unit: int) -> list[str]:
    """Returns a heading, a row for each of `names`, and a row of sums. columns: bytes by name, for each stage."""
    rows = {name: [column[name] for column in columns] for name in names}
    rows["total"] = [sum(column.values()) for column in columns]
    head = _row("", [f"ZeRO {stage}" for stage in STAGES])
    return [head, *(_row(name, [f"{x / unit:,.2f}" for x in values]) for name, values in rows.items())]


def _row(name: str, cells: list[str]) -> str:
    return f"  {name:<16}" + "".join(f"{cell:>10}" for cell in cells)
