"""Chooses the GPU of a worker and its number of CPU threads."""

import os
import re
import socket

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store


def choose_device(local_rank: int) -> torch.device:
    """Returns this worker's GPU, and makes it torch's current device. Returns the CPU if torch sees no GPU.
    local_rank: number of this worker on its machine. Raises ValueError if there are fewer GPUs than workers."""
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
    """Returns the index of this worker's GPU. It is 0 if the launcher lets each worker see only one GPU."""
    return 0 if torch.cuda.device_count() == 1 else local_rank


def in_full_precision() -> None:
    """Switches TF32 off, so that a GPU computes in full float32. By default, torch uses TF32 for convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def check_devices(device: torch.device) -> None:
    """Checks that no two workers share a GPU, and that either all workers have a GPU or none has.
    All workers call this function together. If the check fails, all raise ValueError. device: this worker's device.
    The workers exchange names through torch's store. A collective might hang if two workers share a GPU."""
    rank, world = dist.get_rank(), dist.get_world_size()
    name = "cpu"
    if device.type == "cuda":
        name = f"{socket.gethostname()} GPU {torch.cuda.get_device_properties(device).uuid}"
    store, keys = _get_default_store(), [f"d2s/device/{k}" for k in range(world)]
    store.set(keys[rank], name)
    store.wait(keys)
    refuse_shared_devices([value.decode() for value in store.multi_get(keys)])


def refuse_shared_devices(devices: list[str]) -> None:
    """Raises ValueError if two workers share a GPU, or if only some workers have a GPU.
    devices: a unique name of each worker's GPU, or "cpu", in rank order."""
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
    """Sets how many CPU threads torch uses: D2S_THREADS, or by default this worker's share of the machine's cores.
    This replaces the launcher's choice, which may be one thread, or as many threads as the machine has cores. Raises
    ValueError if D2S_THREADS is not a number from 1 to 9999."""
    threads = os.environ.get("D2S_THREADS")
    if threads is None:
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        threads = str(max(1, len(os.sched_getaffinity(0)) // local_world))
    if not re.fullmatch(r"[1-9]\d{0,3}", threads, re.ASCII):
        raise ValueError(f"D2S_THREADS is {threads!r}: give a number of threads, from 1 to 9999")
    torch.set_num_threads(int(threads))
