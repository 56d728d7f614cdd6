"""What one rank finds out about its node, for `d2s.launchers.check`: facts as lines of JSON on its output."""

import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

MARK = "d2s-check "
"""What a line of facts begins with; anything else on a rank's output is some library's."""
TOKENS = ".check-"
"""Beginning of the name of the folder in which the ranks leave a file each; the caller removes it."""
PACKAGES = ("torch", "deepspeed", "transformers", "triton", "webdataset", "pyarrow", "numpy", "d2s")
HERE, NO_PORT = "here", "no port"
MESSAGE_BYTES = 1 << 26
ROUNDS = 3


def tell(**facts: Any) -> None:
    """One line of facts. Flushed at once: what follows may hang."""
    print(f"\n{MARK}{json.dumps({'rank': int(os.environ['RANK']), **facts})}", flush=True)


def look(data: Path | None, run: Path, patience: float) -> None:
    """Tells everything about this rank, first what it can see alone and then what needs its fellows."""
    fault = port_fault() if os.environ["RANK"] == "0" else ""
    tell(
        node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        versions=dict(versions()),
        data=None if data is None else data_seen(data),
        # Rank 0's file also says whether there is any use in going to meet it.
        shared=leave_token(run, NO_PORT if fault else HERE),
        free=free_bytes(run),
        port=fault,
    )
    names = gpus()
    tell(gpus=len(names), devices=names, asked=os.environ.get("SLURM_GPUS_ON_NODE", ""))
    left, meet = unseen_tokens(run, patience)
    tell(unseen=left)
    if meet:
        rendezvous(patience)


def versions() -> Iterator[tuple[str, str]]:
    """Python's version, and those of what must be the same everywhere."""
    import platform

    yield "python", platform.python_version()
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "missing"


def data_seen(data: Path) -> dict[str, str]:
    """The data set as it looks from here: its fingerprint, or the fault; the ends of each split are read."""
    from d2s.shards.read.index import ShardIndex
    from d2s.shards.read.reader import ShardReader

    try:
        index = ShardIndex.open(data)
        reader = ShardReader(index)
        for split in index.splits:
            rows = index.rows(split)
            for row in {rows[0], rows[-1]} if len(rows) else ():
                reader.record(row)
        reader.close()
    except (ValueError, OSError) as error:
        return {"fault": " ".join(str(error).split())}
    return {"fingerprint": index.fingerprint()}


def _tokens(run: Path) -> Path:
    return run / f"{TOKENS}{os.environ['SLURM_JOB_ID']}"


def leave_token(run: Path, text: str) -> str:
    """Writes a file that every other rank looks for; why it could not, or nothing."""
    folder = _tokens(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f".{os.environ['RANK']}"
        fresh.write_text(text, encoding="ascii")
        fresh.rename(folder / os.environ["RANK"])
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    return ""


def unseen_tokens(run: Path, patience: float) -> tuple[list[int], bool]:
    """The ranks whose files do not become visible here, and whether rank 0 can be met.

    File systems on a network may take their time.
    """
    left = set(range(int(os.environ["WORLD_SIZE"])))
    end = time.monotonic() + patience
    while True:
        # Opened by name: a listing may come from a cache.
        left = {rank for rank in left if not _token(_tokens(run) / str(rank))}
        if not left or time.monotonic() > end:
            return sorted(left), _token(_tokens(run) / "0") != NO_PORT
        time.sleep(0.2)


def _token(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


def free_bytes(run: Path) -> int:
    """What is free where the run would lie; -1 where there is no such place."""
    while not run.exists() and run != run.parent:
        run = run.parent
    try:
        return shutil.disk_usage(run).free
    except OSError:
        return -1


def gpus() -> list[str]:
    """Names, unique in the world, of the CUDA devices that this rank sees."""
    import torch

    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]


def port_fault() -> str:
    """Why the rendezvous cannot listen at its port on this node, or nothing."""
    port = int(os.environ["MASTER_PORT"])
    remedy = "set D2S_PORT to a free one"
    try:
        # With the option that torch's own store listens with: a connection that lingers is no obstacle.
        socket.create_server(("", port)).close()
    except OSError as error:
        what = "taken" if error.errno == errno.EADDRINUSE else str(error.strerror)
        return f"{port} is {what}; {remedy}"
    return ""


def rendezvous(patience: float) -> None:
    """Meets the others, compares clocks, and measures an all-reduce."""
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
        seconds = _all_reduce_seconds(torch.ones(MESSAGE_BYTES // 4, device=device), world)
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        tell(rendezvous=" ".join(str(error).split())[:200] or type(error).__name__)
        return
    # Each byte travels there and back, but for a rank's own share: the rate of the slowest link.
    rate = 2 * (world - 1) / world * MESSAGE_BYTES / seconds if world > 1 else 0.0
    tell(rendezvous="", clock=clock, bytes_per_second=rate)
    dist.barrier()
    dist.destroy_process_group()


def _all_reduce_seconds(tensor: Any, world: int) -> float:
    import torch
    import torch.distributed as dist

    times = []
    for _ in range(ROUNDS + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        tensor /= world
    return min(times[1:])
