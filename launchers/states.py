"""Finds the states of jobs from SLURM, from the result files of tasks, or from the processes of this machine."""

import subprocess
from pathlib import Path

import psutil
import submitit

LOGS = "submitit"
UNKNOWN = "UNKNOWN"
"""The state of a job if SLURM does not answer: the job may be running or have ended."""
ENDED = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL",
    "PREEMPTED", "REVOKED",
)  # fmt: skip


def slurm_states(ids: list[str], folder: Path) -> list[str]:
    """Returns the states of the jobs `ids`: one job, or the jobs of one array.

    Asks SLURM's controller, then its accounting. If SLURM answers but does not know a job any more, the job is
    COMPLETED or FAILED according to the result files in `folder`. UNKNOWN if SLURM does not answer.
    """
    if not ids:
        return []
    array = ids[0].partition("_")[0]
    code, output, errors = _query(["squeue", "-h", "-r", "-t", "all", "-o", "%i %T", "-j", array])
    known = dict(line.split() for line in output.splitlines())
    if set(ids) - set(known):
        _, output, _ = _query(["sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", array])
        # Keeps the first word of a state: "CANCELLED by 1000" is CANCELLED.
        rows = (line.replace("|", " ").split() for line in output.splitlines())
        known = {row[0]: row[1].rstrip("+") for row in rows if len(row) > 1} | known
    # If the controller answers, it has forgotten the jobs that are not in its answer.
    answered = code == 0 or "Invalid job id" in errors
    from_results = {id_: "COMPLETED" if succeeded(folder, id_) else "FAILED" for id_ in ids if answered}
    return [known.get(id_) or from_results.get(id_, UNKNOWN) for id_ in ids]


def _query(command: list[str]) -> tuple[int, str, str]:
    """Runs a program of SLURM. Returns exit code, stdout and stderr; code 1 if it is missing or takes over 60 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return 1, "", ""
    return done.returncode, done.stdout, done.stderr


def succeeded(folder: Path, job: str) -> bool:
    """Returns whether a job left result files and all hold ("success", 0), none ("error", traceback)."""
    results = list((folder / LOGS).glob(f"{job}_*_result.pkl"))
    # Unpickling is safe: submitit wrote these files in our own folder.
    return bool(results) and all(submitit.core.utils.pickle_load(path)[0] == "success" for path in results)


def local_controller(pid: str) -> psutil.Process | None:
    """Returns submitit's controller process with number `pid`; None if it ended, even if the number was reused."""
    try:
        process = psutil.Process(int(pid))
        return process if "submitit" in " ".join(process.cmdline()) else None
    except psutil.Error:
        return None


def requeue_file(logs: Path, job: str) -> Path:
    """Returns the path of the file that a local job creates in submitit's folder to ask for a restart."""
    return logs / f"{job}_requeue"
