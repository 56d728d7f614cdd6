"""The pre-flight of an allocation: `python -m d2s.launchers.check --data DIR --run DIR`.

Called in a shell of salloc or in a batch script, it starts itself as every rank of the allocation through srun,
gathers what they see, and says in one line each what would have made a training fail: nodes that cannot read the
data or write the run, other versions on some nodes, a taken port, ranks that do not meet, clocks apart, no GPU, a
full disk. Exit code 0 without faults, 1 with them, 2 where the check itself could not be made.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from d2s.common.command import Parser, run
from d2s.launchers.check_rank import MARK, TOKENS, look

CLOCKS_APART = 1.0
LIMIT = 55.0
Facts = dict[int, dict[str, Any]]


def gathered(output: str) -> Facts:
    """The facts of each rank, from what all of them printed."""
    facts: Facts = {}
    for line in output.splitlines():
        _, mark, text = line.partition(MARK)
        if mark:
            told = json.loads(text)
            facts.setdefault(told.pop("rank"), {}).update(told)
    return facts


def faults(facts: Facts, world: int, *, min_free: float, cpu: bool = False) -> list[str]:
    """One line for each thing that would make a run fail; the ranks of a node are told together."""
    nodes = {rank: str(told.get("node", "?")) for rank, told in facts.items()}
    found: list[str] = []

    def on(ranks: Iterable[int]) -> str:
        names = sorted({nodes[rank] for rank in ranks})
        return f"node{'s' if len(names) > 1 else ''} {', '.join(names)}"

    silent = sorted(set(range(world)) - set(facts))
    if silent:
        found.append(f"ranks {_short(silent)} never started, or said nothing: see the lines of srun above")
    found += _each(facts, "data unreadable", on, lambda told: (told.get("data") or {}).get("fault"))
    found += _different(facts, "data", on, lambda told: (told.get("data") or {}).get("fingerprint"))
    found += _each(facts, "run folder not writable", on, lambda told: told.get("shared"))
    for rank, told in sorted(facts.items()):
        if told.get("unseen"):
            found.append(
                f"{on([rank])}: rank {rank} does not see what ranks {_short(told['unseen'])} wrote into the run "
                "folder: is it on a shared file system?"
            )
    names = sorted({name for told in facts.values() for name in told.get("versions", {})})
    for name in names:
        found += _different(
            facts, f"version of {name}", on, lambda told, n=name: told.get("versions", {}).get(n)
        )
    found += _each(facts, "port of the rendezvous", on, lambda told: told.get("port"))
    if not cpu:
        found += _each(facts, "no GPU visible", on, _gpu_fault)
        found += _crowded(facts)
    found += _each(facts, "rendezvous failed", on, lambda told: told.get("rendezvous"))
    stuck = [rank for rank, told in facts.items() if "rendezvous" not in told]
    if stuck and not facts.get(0, {}).get("port"):
        found.append(f"{on(stuck)}: ranks {_short(sorted(stuck))} never met the others")
    clocks = [told["clock"] for told in facts.values() if "clock" in told]
    if clocks and max(clocks) - min(clocks) > CLOCKS_APART:
        found.append(f"the clocks of the nodes are {max(clocks) - min(clocks):.0f} s apart")
    low = [rank for rank, told in facts.items() if 0 <= told.get("free", -1) < min_free * 1e9]
    if low:
        free = min(facts[rank]["free"] for rank in low)
        found.append(f"{on(low)}: {free / 1e9:.1f} GB free for the run, below --min-free {min_free:g}")
    return found


def _gpu_fault(told: Mapping[str, Any]) -> str | None:
    if told.get("gpus") != 0:
        return None
    if told.get("asked") in (None, "", "0"):
        return "the job asked for none; add --gres=gpu:N, or --cpu to this check"
    return f"the job holds {told['asked']} on this node: is torch a CPU build here, or the driver missing?"


def _crowded(facts: Facts) -> list[str]:
    """One line for each node with fewer GPUs than ranks, of which each must have its own."""
    ranks: Counter[str] = Counter()
    devices: dict[str, set[str]] = {}
    for told in facts.values():
        node = str(told.get("node", "?"))
        ranks[node] += 1
        # Ranks may see the same ones, or one each: that is told by their names.
        devices.setdefault(node, set()).update(told.get("devices", ()))
    return [
        f"node {node}: {count} ranks on a node that shows {len(devices[node])} GPUs; "
        "--ntasks-per-node and --gres=gpu:N must name the same number"
        for node, count in sorted(ranks.items())
        if 0 < len(devices[node]) < count
    ]


def _each(facts: Facts, what: str, on: Any, of: Any) -> list[str]:
    """One line for each different complaint, with the nodes that make it."""
    said: dict[str, list[int]] = {}
    for rank, told in sorted(facts.items()):
        if text := of(told):
            said.setdefault(str(text), []).append(rank)
    return [f"{on(ranks)}: {what}: {text}" for text, ranks in said.items()]


def _different(facts: Facts, what: str, on: Any, of: Any) -> list[str]:
    """A line where ranks tell different values, the rarer ones named."""
    # By rank: where there is no majority, rank 0 is right.
    values = {rank: of(told) for rank, told in sorted(facts.items()) if of(told) is not None}
    count = Counter(values.values())
    if len(count) < 2:
        return []
    usual = count.most_common(1)[0][0]
    return [
        f"{on([rank for rank, value in values.items() if value == other])}: {what} is {other}, elsewhere {usual}"
        for other in count
        if other != usual
    ]


def _short(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def summary(facts: Facts) -> list[str]:
    """What was found, in a few lines."""
    nodes = Counter(str(told.get("node", "?")) for told in facts.values())
    lines = [
        f"ranks    {len(facts)} on {len(nodes)} nodes ({', '.join(f'{n}: {c}' for n, c in sorted(nodes.items()))})"
    ]
    gpus = {told.get("gpus") for told in facts.values()}
    lines.append(f"gpus     {', '.join(str(g) for g in sorted(gpus, key=str))} visible to a rank")
    rates = [told["bytes_per_second"] for told in facts.values() if told.get("bytes_per_second")]
    if rates:
        lines.append(f"network  all-reduce of 64 MiB at {min(rates) / 1e9:.2f} GB/s a rank")
    free = [told["free"] for told in facts.values() if told.get("free", -1) >= 0]
    if free:
        lines.append(f"disk     {min(free) / 1e9:.0f} GB free for the run")
    return lines


# The ranks start as those of a training do, with the site's environment.
SCRIPT = """
source launchers/job.sh >/dev/null
exec srun --unbuffered --overlap ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \\
  "${container[@]}" "${extra[@]}" "${python[@]}" -m d2s.launchers.task check --rank "$@"
"""


def _start_ranks(arguments: argparse.Namespace) -> tuple[str, str]:
    """Everything that the ranks printed, and what srun and they said on stderr."""
    command = [
        "bash",
        "-c",
        SCRIPT,
        "check",
        "--run",
        str(arguments.run),
        "--patience",
        str(arguments.patience),
    ]
    if arguments.data:
        command += ["--data", str(arguments.data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            return process.communicate(timeout=arguments.limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # srun ends its tasks
            return process.communicate()


def _check(arguments: argparse.Namespace) -> list[str]:
    """Runs the check; prints what was found, and returns the faults."""
    if "SLURM_JOB_ID" not in os.environ:
        raise ValueError("no allocation: call it in a shell of salloc, or in a batch script")
    if not Path("launchers/job.sh").is_file():
        raise ValueError(f"{Path.cwd()} holds no launchers/job.sh: call it in the project's folder")
    world = int(os.environ.get("SLURM_NTASKS") or os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    start = time.monotonic()
    try:
        out, err = _start_ranks(arguments)
    finally:
        shutil.rmtree(arguments.run / f"{TOKENS}{os.environ['SLURM_JOB_ID']}", ignore_errors=True)
    facts = gathered(out)
    if not facts:
        raise ValueError(f"no rank said anything; srun: {err.strip() or 'nothing'}")
    print("\n".join(summary(facts)))
    found = faults(facts, world, min_free=arguments.min_free, cpu=arguments.cpu)
    if any("never" in line for line in found) and err.strip():
        print(err.strip(), file=sys.stderr)
    for line in found:
        print(f"FAULT    {line}")
    print(
        f"verdict  {f'{len(found)} faults' if found else 'fit to train'}, in {time.monotonic() - start:.0f} s"
    )
    return found


def main(argv: list[str] | None = None) -> int:
    """Runs the check, or one rank of it. Returns its exit code."""
    parser = Parser(
        prog="python -m d2s.launchers.check",
        description="Look for what would make a training fail on the allocation that this is called in.",
        epilog="example: salloc --nodes=2 --ntasks-per-node=8 --gres=gpu:8 .venv/bin/python -m d2s.launchers.check"
        " --data data/f30k --run runs/f30k",
    )
    parser.add_argument("--data", type=Path, help="data set that every node must be able to read")
    parser.add_argument(
        "--run", type=Path, default=Path("runs"), help="folder that all must be able to write"
    )
    parser.add_argument(
        "--min-free", type=float, default=20.0, metavar="GB", help="disk space to ask for (20)"
    )
    parser.add_argument("--cpu", action="store_true", help="the training is to run on CPUs; no GPU is missed")
    parser.add_argument(
        "--patience", type=float, default=20.0, metavar="S", help="how long ranks wait for others"
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT, metavar="S", help=f"end it all after ({LIMIT:g})"
    )
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rank:
        look(arguments.data, arguments.run, arguments.patience)
        return 0
    found: list[str] = []
    code = run(lambda: found.extend(_check(arguments)))
    return code or int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
