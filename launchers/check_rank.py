"""Runs the checks of `d2s.launchers.check` on one rank, and prints the results as lines of JSON."""

import errno
import json
import os
import platform
import shutil
import socket
import time
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from d2s.common.files import write_text

MARK = "d2s-check "
"""Start of each line with results, to tell it from lines that libraries print."""
PACKAGES = ("torch", "deepspeed", "transformers", "triton", "webdataset", "pyarrow", "numpy", "d2s")
PORT = "port of the rendezvous"
READY, NO_PORT = "ready", "no port"
MESSAGE_BYTES = 1 << 26


def report(**values: Any) -> None:
    """Prints `values` as results of this rank. Flushes the output at once, because the next check may hang.

    The value `faults` maps the name of a possible fault to details, or to "" if the fault did not occur. The value
    `same` maps names to values that must be equal on all ranks.
    """
    print(f"\n{MARK}{json.dumps({'rank': int(os.environ['RANK']), **values})}", flush=True)


def report_rank(data: Path | None, run: Path, patience: float, *, cpu: bool) -> None:
    """Runs all checks on this rank and prints the results. Checks that wait for other ranks come last.

    data: the data set, or None to skip its check. run: the run folder. patience: seconds to wait for other ranks.
    cpu: whether the training runs on CPUs.
    """
    port = port_fault() if os.environ["RANK"] == "0" else ""
    # Rank 0's token (see `token_folder`) also says whether the other ranks can connect to rank 0.
    unwritable = write_token(run, NO_PORT if port else READY)
    same = {f"version of {name}": _version(name) for name in PACKAGES}
    report(
        node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        same={"version of python": platform.python_version(), **same},
        faults={"run folder not writable": unwritable, PORT: port},
        free=free_bytes(run),
    )
    if data:
        report(**check_data(data))
    if not cpu:
        report(**check_gpus())
    report(unseen=wait_for_tokens(run, patience))
    if _read(token_folder(run) / "0") != NO_PORT:
        rendezvous(patience)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def check_data(data: Path) -> dict[str, dict[str, str]]:
    """Reads two samples of each split. Returns arguments for `report`: a fault, or the data set's fingerprint."""
    from d2s.shards.read.index import ShardIndex
    from d2s.shards.read.records import ShardReader

    try:
        index = ShardIndex.open(data)
        reader = ShardReader(index)
        for split in index.splits:
            rows = index.rows(split)
            for row in {rows[0], rows[-1]} if len(rows) else ():
                reader.record(row)
        reader.close()
    except (ValueError, OSError) as error:
        return {"faults": {"data unreadable": " ".join(str(error).split())}}
    return {"same": {"data": index.fingerprint()}}


def token_folder(run: Path) -> Path:
    """Returns the folder of tokens. A token is a file that each rank writes to test if the run folder is shared."""
    return run / f".check-{os.environ['SLURM_JOB_ID']}"


def write_token(run: Path, text: str) -> str:
    """Writes this rank's token with the content `text`. Returns "", or the error message if this fails."""
    try:
        write_text(token_folder(run) / os.environ["RANK"], text)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return ""


def wait_for_tokens(run: Path, patience: float) -> list[int]:
    """Waits up to `patience` seconds for the tokens of all ranks. Returns the ranks whose token is missing."""
    end = time.monotonic() + patience
    while True:
        # Opens each file by name, because a network file system may show an outdated listing of a folder.
        world = int(os.environ["WORLD_SIZE"])
        unseen = [rank for rank in range(world) if not _read(token_folder(run) / str(rank))]
        if not unseen or time.monotonic() > end:
            return unseen
        time.sleep(0.2)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


def free_bytes(run: Path) -> int:
    """Returns the free space on the disk of the run folder, in bytes. The folder need not exist yet."""
    while not run.exists():
        run = run.parent
    return shutil.disk_usage(run).free


def check_gpus() -> dict[str, Any]:
    """Returns arguments for `report`: the unique ids of the GPUs that this rank sees, and a fault if it sees none."""
    import torch

    names = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    asked = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    reason = "the job asked for none; add --gres=gpu:N, or --cpu to this check"
    if asked != "0":
        reason = f"the job holds {asked} on this node: is torch a CPU build here, or the driver missing?"
    return {"gpus": names, "faults": {"no GPU visible": "" if names else reason}}


def port_fault() -> str:
    """Returns the reason why this node cannot listen at MASTER_PORT. Returns "" if it can."""
    port = int(os.environ["MASTER_PORT"])
    try:
        # Like torch's store, create_server can use a port whose earlier connections were closed a moment ago.
        socket.create_server(("", port)).close()
    except OSError as error:
        reason = "taken" if error.errno == errno.EADDRINUSE else str(error.strerror)
        return f"{port} is {reason}; set D2S_PORT to a free one"
    return ""


def rendezvous(patience: float) -> None:
    """Connects all ranks within `patience` seconds. Reports the clock and the all-reduce bandwidth, or the error."""
    import torch
    import torch.distributed as dist

    from d2s.workers.devices import cuda_index

    world = int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", cuda_index(int(os.environ["LOCAL_RANK"]))) if cuda else torch.device("cpu")
    try:
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=patience))
        dist.barrier()
        clock = time.time()
        message = torch.zeros(MESSAGE_BYTES // 4, device=device)
        seconds = []
        for _ in range(4):  # the first all-reduce is a warm-up
            start = time.perf_counter()
            dist.all_reduce(message)
            dist.barrier()  # on a GPU the barrier also waits for the all-reduce
            seconds.append(time.perf_counter() - start)
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        text = " ".join(str(error).split())[:200] or type(error).__name__
        report(faults={"rendezvous failed": text}, met=False)
        return
    # In a ring all-reduce each rank sends (world - 1) / world of the bytes twice.
    rate = 2 * (world - 1) / world * MESSAGE_BYTES / min(seconds[1:]) if world > 1 else 0.0
    report(met=True, clock=clock, bytes_per_second=rate)
    dist.barrier()
    dist.destroy_process_group()
