"""Checks a SLURM allocation before a training: `python -m d2s.launchers.check --data DIR --run DIR`.

Run it in a shell of salloc or in a batch script. It starts a process for each rank through srun, collects the
reports of all ranks, and prints a line for each fault that would make a training fail. It finds nodes that cannot
read the data or write the run folder, versions or clocks that differ, a port in use, ranks that cannot connect,
missing GPUs, and a full disk. The exit code is 0 without faults, 1 with faults, or 2 if the check could not run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from d2s.common.command import Parser, run, user_path
from d2s.launchers.check_rank import MARK, PORT, report_rank, token_folder

CLOCKS_APART = 1.0
"""Largest allowed difference between the clocks of two nodes, in seconds."""
Reports = dict[int, dict[str, Any]]
"""Maps a rank to the values that it printed with `check_rank.report`. If the rank hung or died, some are missing."""
# A bash script. It sources job.sh, so that ranks have the same environment as in a training.
SCRIPT = """
source launchers/job.sh >/dev/null
exec srun --unbuffered --overlap ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \\
  "${container[@]}" "${extra[@]}" "${python[@]}" -m d2s.launchers.task check --rank "$@"
"""


def parse_reports(output: str) -> Reports:
    """Returns a report for each rank. output: stdout of srun, with the lines of all ranks in any order."""
    reports: Reports = {}
    for line in output.splitlines():
        _, mark, text = line.partition(MARK)
        if mark:
            values = json.loads(text)
            report = reports.setdefault(values.pop("rank"), {"faults": {}, "same": {}})
            for name in ("faults", "same"):
                report[name] |= values.pop(name, {})
            report |= values
    return reports


def find_faults(reports: Reports, world: int, *, min_free: float) -> list[str]:
    """Returns a line for each fault that would make a training on `world` ranks fail.

    min_free: disk space that the training needs, in GB.
    """
    found: list[str] = []
    silent = sorted(set(range(world)) - set(reports))
    if silent:
        found.append(f"ranks {_list(silent)} never started, or said nothing: see the lines of srun above")
    found += _complaints(reports) + _differences(reports) + _shared_gpus(reports)
    found += [
        f"{_on(reports, [rank])}: rank {rank} does not see what ranks {_list(report['unseen'])} wrote into the run "
        "folder: is it on a shared file system?"
        for rank, report in sorted(reports.items())
        if report.get("unseen")
    ]
    stuck = sorted(rank for rank, report in reports.items() if "met" not in report)
    if stuck and not any(report["faults"].get(PORT) for report in reports.values()):
        found.append(f"{_on(reports, stuck)}: ranks {_list(stuck)} never met the others")
    clocks = [report["clock"] for report in reports.values() if "clock" in report]
    if clocks and max(clocks) - min(clocks) > CLOCKS_APART:
        found.append(f"the clocks of the nodes are {max(clocks) - min(clocks):.0f} s apart")
    free = {rank: report["free"] / 1e9 for rank, report in reports.items()}
    low = [rank for rank in free if free[rank] < min_free]
    if low:
        least = min(free.values())
        found.append(f"{_on(reports, low)}: {least:.1f} GB free for the run, below --min-free {min_free:g}")
    return found


def _complaints(reports: Reports) -> list[str]:
    """Returns a line for each fault in the ranks' reports, with the nodes on which the fault occurs."""
    ranks: dict[str, list[int]] = {}
    for rank, report in sorted(reports.items()):
        for what, details in report["faults"].items():
            if details:
                ranks.setdefault(f"{what}: {details}", []).append(rank)
    return [f"{_on(reports, having)}: {line}" for line, having in ranks.items()]


def _differences(reports: Reports) -> list[str]:
    """Returns a line for each value in `same` that is not the most common value. In a tie, rank 0's value wins."""
    lines = []
    for what in dict.fromkeys(name for report in reports.values() for name in report["same"]):
        values = {rank: report["same"].get(what) for rank, report in sorted(reports.items())}
        (usual, _), *others = Counter(filter(None, values.values())).most_common()
        for other, _ in others:
            ranks = [rank for rank, value in values.items() if value == other]
            lines.append(f"{_on(reports, ranks)}: {what} is {other}, elsewhere {usual}")
    return lines


def _shared_gpus(reports: Reports) -> list[str]:
    """Returns a line for each node with fewer GPUs than ranks. Each rank needs its own GPU."""
    ranks = Counter(report["node"] for report in reports.values())
    # Counts distinct ids of GPUs, because a rank may see all GPUs of its node or only its own GPU.
    gpus: dict[str, set[str]] = {}
    for report in reports.values():
        gpus.setdefault(report["node"], set()).update(report.get("gpus", ()))
    return [
        f"node {node}: {count} ranks on a node that shows {len(gpus[node])} GPUs; "
        "--ntasks-per-node and --gres=gpu:N must name the same number"
        for node, count in sorted(ranks.items())
        if 0 < len(gpus[node]) < count
    ]


def _on(reports: Reports, ranks: Iterable[int]) -> str:
    """Returns the names of the nodes on which `ranks` run, as "node a" or "nodes a, b"."""
    names = sorted({reports[rank]["node"] for rank in ranks})
    return f"node{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def summary(reports: Reports) -> list[str]:
    """Returns the lines to print about the ranks, GPUs, network and disk."""
    nodes = Counter(report["node"] for report in reports.values())
    per_node = ", ".join(f"{name}: {count}" for name, count in sorted(nodes.items()))
    gpus = sorted({str(len(report["gpus"])) for report in reports.values() if "gpus" in report})
    rates = [report["bytes_per_second"] for report in reports.values() if report.get("bytes_per_second")]
    lines = [f"ranks    {len(reports)} on {len(nodes)} nodes ({per_node})"]
    if gpus:
        lines.append(f"gpus     {', '.join(gpus)} visible to a rank")
    if rates:
        lines.append(f"network  all-reduce of 64 MiB at {min(rates) / 1e9:.2f} GB/s a rank")
    free = min(report["free"] for report in reports.values()) / 1e9
    return [*lines, f"disk     {free:.0f} GB free for the run"]


def _check(arguments: argparse.Namespace, options: list[str]) -> list[str]:
    """Runs all ranks with `options`. Prints and returns the faults. Raises ValueError if the check cannot run."""
    if "SLURM_JOB_ID" not in os.environ:
        raise ValueError("no allocation: call it in a shell of salloc, or in a batch script")
    if not Path("launchers/job.sh").is_file():
        raise ValueError(f"{Path.cwd()} holds no launchers/job.sh: call it in the project's folder")
    world = int(os.environ.get("SLURM_NTASKS") or os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    start = time.monotonic()
    try:
        # After the limit, `timeout` sends TERM to srun. srun then ends the processes of all ranks.
        command = ["timeout", "--foreground", str(arguments.limit), "bash", "-c", SCRIPT, "check", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        shutil.rmtree(token_folder(arguments.run), ignore_errors=True)
    reports, errors = parse_reports(done.stdout), done.stderr.strip()
    if not reports:
        raise ValueError(f"no rank said anything; srun: {errors or 'nothing'}")
    print("\n".join(summary(reports)))
    faults = find_faults(reports, world, min_free=arguments.min_free)
    if any("never" in line for line in faults) and errors:
        print(errors, file=sys.stderr)
    for line in faults:
        print(f"FAULT    {line}")
    verdict = f"{len(faults)} faults" if faults else "fit to train"
    print(f"verdict  {verdict}, in {time.monotonic() - start:.0f} s")
    return faults


def main(argv: list[str] | None = None) -> int:
    """Runs the check. With the hidden option --rank, runs one rank of the check. Returns the exit code."""
    parser = Parser(
        prog="python -m d2s.launchers.check",
        description="Look for what would make a training fail on the allocation that this is called in.",
        epilog="example: salloc --nodes=2 --ntasks-per-node=8 --gres=gpu:8 .venv/bin/python -m d2s.launchers.check"
        " --data data/f30k --run runs/f30k",
    )
    add = parser.add_argument
    add("--data", type=user_path, help="data set that every node must be able to read")
    add("--run", type=user_path, default=Path("runs"), help="folder that all ranks must be able to write")
    add("--min-free", type=float, default=20.0, metavar="GB", help="free disk space that a run needs (20)")
    add("--cpu", action="store_true", help="the training runs on CPUs: missing GPUs are no fault")
    add("--patience", type=float, default=20.0, metavar="S", help="seconds that ranks wait for others (20)")
    add("--limit", type=float, default=55.0, metavar="S", help="seconds after which the check is ended (55)")
    add("--rank", action="store_true", help=argparse.SUPPRESS)
    options = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(options)
    if arguments.rank:
        report_rank(arguments.data, arguments.run, arguments.patience, cpu=arguments.cpu)
        return 0
    return run(lambda: int(bool(_check(arguments, options))))


if __name__ == "__main__":
    sys.exit(main())
