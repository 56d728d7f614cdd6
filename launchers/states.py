"""What became of jobs: asked of SLURM, of the results that tasks leave, or of a process of this machine."""

import re
import subprocess
from pathlib import Path

import psutil
import submitit

LOGS = "submitit"
UNKNOWN = "UNKNOWN"
"""SLURM could not be asked: neither running nor ended as far as anybody here knows."""
ENDED = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL",
    "PREEMPTED", "REVOKED",
)  # fmt: skip


def slurm_states(numbers: list[str], folder: Path) -> list[str]:
    """The states of one job, or of the jobs of one array, in the order of `numbers`.

    By the controller's memory, or accounting, or, where neither knows the job any more, the results that its tasks
    left; UNKNOWN where SLURM does not answer.
    """
    if not numbers:
        return []
    main = numbers[0].partition("_")[0]
    code, shown, complaint = _ask(["scontrol", "show", "job", "-o", main])
    known = _by_controller(shown)
    if set(numbers) - set(known):
        _, told, _ = _ask(["sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", main])
        known = _by_accounting(told) | known
    # The controller answers, and has forgotten the job; or knows other jobs of the array.
    forgotten = code == 0 or "Invalid job id" in complaint
    return [
        known.get(number) or (_by_results(folder, number) if forgotten else UNKNOWN) for number in numbers
    ]


def _ask(command: list[str]) -> tuple[int, str, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return 1, "", ""
    return done.returncode, done.stdout, done.stderr


def _by_controller(shown: str) -> dict[str, str]:
    """States by number, of the lines of `scontrol show job -o`."""
    found: dict[str, str] = {}
    for line in shown.splitlines():
        words = dict(word.partition("=")[::2] for word in line.split())
        if "JobState" not in words:
            continue
        if "ArrayTaskId" in words:
            number = f"{words.get('ArrayJobId')}_[{words['ArrayTaskId']}]"
        else:
            number = words.get("JobId", "")
        found.update(dict.fromkeys(_numbers(number), words["JobState"]))
    return found


def _by_accounting(told: str) -> dict[str, str]:
    """States by number, of sacct's lines `JobID|State`; "CANCELLED by 1000" is cancelled."""
    found: dict[str, str] = {}
    for line in told.splitlines():
        number, _, state = line.partition("|")
        if state.split():
            found.update(dict.fromkeys(_numbers(number), state.split()[0].rstrip("+")))
    return found


def _numbers(text: str) -> list[str]:
    """Every job that "7", "7_2" or, of an array's waiting jobs together, "7_[0-2,5%2]" stands for."""
    main, bracket, indices = text.partition("_[")
    if not bracket:
        return [text]
    found = []
    for part in re.sub(r"[%:].*", "", indices.rstrip("]")).split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found += [f"{main}_{index}" for index in range(int(first), int(last or first) + 1)]
    return found


def _by_results(folder: Path, number: str) -> str:
    return "COMPLETED" if succeeded(folder, number) else "FAILED"


def succeeded(folder: Path, number: str) -> bool:
    """Whether every task of a job has left a good result."""
    results = list((folder / LOGS).glob(f"{number}_*_result.pkl"))
    return bool(results) and all(_good(path) for path in results)


def _good(path: Path) -> bool:
    # Our own pickle, written by submitit in our own folder: ("success", 0) or ("error", traceback).
    return submitit.core.utils.pickle_load(path)[0] == "success"


def alive(pid: str) -> bool:
    """Whether submitit's local controller of that number runs, and not another process that got the number since."""
    try:
        return "submitit" in " ".join(psutil.Process(int(pid)).cmdline())
    except psutil.Error:
        return False
