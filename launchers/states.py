"""The states of jobs, from SLURM, from the results that tasks leave, or from a process of this machine."""

import subprocess
from pathlib import Path

import psutil
import submitit

LOGS = "submitit"
UNKNOWN = "UNKNOWN"
"""SLURM did not answer: the job may be running or have ended."""
ENDED = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL",
    "PREEMPTED", "REVOKED",
)  # fmt: skip


def slurm_states(ids: list[str], folder: Path) -> list[str]:
    """The states of one job, or of the jobs of one array, in the order of `ids`.

    Asks the controller, then accounting. If neither knows the job any more, the results that its tasks left in
    `folder` decide between COMPLETED and FAILED. UNKNOWN if SLURM does not answer.
    """
    if not ids:
        return []
    array = ids[0].partition("_")[0]
    code, output, errors = _query(["squeue", "-h", "-r", "-t", "all", "-o", "%i %T", "-j", array])
    known = dict(line.split() for line in output.splitlines())
    if set(ids) - set(known):
        _, output, _ = _query(["sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", array])
        # "CANCELLED by 1000" is CANCELLED.
        rows = (line.replace("|", " ").split() for line in output.splitlines())
        known = {row[0]: row[1].rstrip("+") for row in rows if len(row) > 1} | known
    # A controller that answers has forgotten the job, or knows only other jobs of the array.
    answered = code == 0 or "Invalid job id" in errors
    from_results = {id_: "COMPLETED" if succeeded(folder, id_) else "FAILED" for id_ in ids if answered}
    return [known.get(id_) or from_results.get(id_, UNKNOWN) for id_ in ids]


def _query(command: list[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of one of SLURM's programs; code 1 if it is missing or takes a minute."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return 1, "", ""
    return done.returncode, done.stdout, done.stderr


def succeeded(folder: Path, job: str) -> bool:
    """Whether every task of a job left a result, ("success", 0), and not ("error", traceback)."""
    results = list((folder / LOGS).glob(f"{job}_*_result.pkl"))
    # Unpickling is safe: submitit wrote these files in our own folder.
    return bool(results) and all(submitit.core.utils.pickle_load(path)[0] == "success" for path in results)


def local_controller(pid: str) -> psutil.Process | None:
    """The running submitit controller with this process number; None if it ended or the number was reused."""
    try:
        process = psutil.Process(int(pid))
        return process if "submitit" in " ".join(process.cmdline()) else None
    except psutil.Error:
        return None


def requeue_file(logs: Path, job: str) -> Path:
    """The file in submitit's folder by which a local job asks to be started again, as D2S_REQUEUE is on SLURM."""
    return logs / f"{job}_requeue"
