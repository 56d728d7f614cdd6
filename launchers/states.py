"""Finds the states of jobs. Asks SLURM, or reads the result files of tasks and the processes of this machine."""

import subprocess
from pathlib import Path

import psutil
import submitit

LOGS = "submitit"
UNKNOWN = "UNKNOWN"
"""The state of a job if SLURM does not answer. The job may be running or may have ended."""
ENDED = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL",
    "PREEMPTED", "REVOKED",
)  # fmt: skip


def slurm_states(ids: list[str], folder: Path) -> list[str]:
    """Returns the state of each job in `ids`, which must be one job or jobs of one array.

    Asks SLURM's controller, then SLURM's accounting. If SLURM answers but no longer knows a job, the result files in
    `folder` decide between COMPLETED and FAILED. If SLURM does not answer, the state is UNKNOWN.
    """
    if not ids:
        return []
    array = ids[0].partition("_")[0]
    code, output, errors = _query(["squeue", "-h", "-r", "-t", "all", "-o", "%i %T", "-j", array])
    known = dict(line.split() for line in output.splitlines())
    if set(ids) - set(known):
        _, output, _ = _query(["sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", array])
        # Keeps only the first word of a state. For example, "CANCELLED by 1000" becomes CANCELLED.
        rows = (line.replace("|", " ").split() for line in output.splitlines())
        known = {row[0]: row[1].rstrip("+") for row in rows if len(row) > 1} | known
    # If the controller answers without naming a job, the job ended some time ago.
    answered = code == 0 or "Invalid job id" in errors
    from_results = {id_: "COMPLETED" if succeeded(folder, id_) else "FAILED" for id_ in ids if answered}
    return [known.get(id_) or from_results.get(id_, UNKNOWN) for id_ in ids]


def _query(command: list[str]) -> tuple[int, str, str]:
    """Runs a SLURM command. Returns exit code, stdout and stderr. The code is 1 if it is missing or takes 60 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return 1, "", ""
    return done.returncode, done.stdout, done.stderr


def succeeded(folder: Path, job: str) -> bool:
    """Returns whether a job left result files of submitit that all report success."""
    results = list((folder / LOGS).glob(f"{job}_*_result.pkl"))
    # Unpickling is safe, because submitit wrote these files in the folder of the pipeline or sweep.
    return bool(results) and all(submitit.core.utils.pickle_load(path)[0] == "success" for path in results)


def local_controller(pid: str) -> psutil.Process | None:
    """Returns the submitit controller with process number `pid`. Returns None if the controller has ended."""
    try:
        process = psutil.Process(int(pid))
        return process if "submitit" in " ".join(process.cmdline()) else None
    except psutil.Error:
        return None


def requeue_file(logs: Path, job: str) -> Path:
    """Returns the path of the file with which a local job asks for a restart. logs: submitit's folder."""
    return logs / f"{job}_requeue"
