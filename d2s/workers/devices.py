"""Chooses a worker's GPU, or its number of CPU threads."""

import os
import re
import socket

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store


def choose_device(local_rank: int) -> torch.device:
    """Makes this worker's GPU torch's current device and returns it; returns the CPU if torch sees no GPU.

    Raises ValueError if the machine has GPUs, but fewer than workers.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", cuda_index(local_rank))
    if device.index >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} finds {torch.cuda.device_count()} GPUs: start as many workers as a machine has"
        )
    os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes its device from it
    torch.cuda.set_device(device)
    in_full_precision()
    return device


def cuda_index(local_rank: int) -> int:
    """Returns the index of this worker's GPU. If the launcher shows each worker only one GPU, the index is 0."""
    return 0 if torch.cuda.device_count() == 1 else local_rank


def in_full_precision() -> None:
    """Switches TF32 off, so that a GPU computes in full float32. By default, torch uses TF32 for convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def check_devices(device: torch.device) -> None:
    """Checks that no two workers share a GPU, and that all workers or none have one. All workers call it together.

    Raises ValueError on every worker. The devices are exchanged through torch's store: a collective might hang.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    name = "cpu"
    if device.type == "cuda":
        name = f"{socket.gethostname()} GPU {torch.cuda.get_device_properties(device).uuid}"
    store, keys = _get_default_store(), [f"d2s/device/{k}" for k in range(world)]
    store.set(keys[rank], name)
    store.wait(keys)
    refuse_shared_devices([value.decode() for value in store.multi_get(keys)])


def refuse_shared_devices(devices: list[str]) -> None:
    """Raises ValueError if two workers share a GPU or only some have one. devices: by rank, a GPU's name or "cpu"."""
    without = [rank for rank, name in enumerate(devices) if name == "cpu"]
    if without and len(without) < len(devices):
        raise ValueError(
            f"rank {without[0]} of {len(devices)} sees no GPU, and others do: mend its machine, or hide the GPUs "
            "from all workers with CUDA_VISIBLE_DEVICES=''"
        )
    first: dict[str, int] = {}
    for rank, name in enumerate(devices):
        if name != "cpu" and first.setdefault(name, rank) != rank:
            raise ValueError(
                f"ranks {first[name]} and {rank} share {name}: start as many workers as a machine has GPUs, or "
                "train on CPUs with CUDA_VISIBLE_DEVICES=''"
            )


def share_cores() -> None:
    """Sets how many CPU threads torch uses: D2S_THREADS, or else this worker's share of the machine's cores.

    Some launchers set one thread for each worker, others as many as the machine has cores. Raises ValueError if
    D2S_THREADS is not a number from 1 to 9999.
    """
    threads = os.environ.get("D2S_THREADS")
    if threads is None:
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        threads = str(max(1, len(os.sched_getaffinity(0)) // local_world))
    if not re.fullmatch(r"[1-9]\d{0,3}", threads, re.ASCII):
        raise ValueError(f"D2S_THREADS is {threads!r}: give a number of threads, from 1 to 9999")
    torch.set_num_threads(int(threads))
