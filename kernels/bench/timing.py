"""How it is measured: variants take turns, on inputs that are not in a cache, by the device's clock; peak memory."""

import ctypes
import gc
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from d2s.kernels.problems import Inputs, Run, one_line

MODES = ("full", "forward", "backward")
# Assumed size of the last cache level where the device does not tell, in bytes.
CACHE = 64 << 20
MOST_SETS = 64
# The least repeats of a slow variant.
FEWEST = 3


def step(run: Run, inputs: Inputs, mode: str) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """(the function to time, the function to call before it without timing) for one step in a mode."""
    if mode == "forward" or not inputs.leaves:
        return lambda: run(inputs), None
    # A variant may compute its gradients in its own way.
    gradients = getattr(run, "gradients", lambda value, inputs: inputs.gradients(value))
    if mode == "full":
        return lambda: gradients(run(inputs), inputs), None
    values: list[Tensor] = []
    return lambda: gradients(values.pop(), inputs), lambda: values.append(run(inputs))


def sets_needed(nbytes: int, device: str) -> int:
    """How many sets of inputs of nbytes each push one another out of the last cache level."""
    if device.startswith("cuda"):
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", CACHE)
    else:
        file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
        text = file.read_text(encoding="ascii").strip() if file.is_file() else ""
        cache = int(text[:-1]) << 10 if text.endswith("K") else CACHE
    return min(max(2, math.ceil(2 * cache / max(nbytes, 1))), MOST_SETS)


def in_turn(
    runs: dict[str, Run],
    inputs: Sequence[Inputs],
    mode: str,
    repeats: int,
    warm: int,
    device: str,
    longest: float = math.inf,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(milliseconds of every repeat by variant, why others failed). Variants take turns; each round has new inputs.

    A variant stops after `longest` seconds, but not before FEWEST repeats; its warm-up stops after a tenth of that.
    The first round does not count, since it may compile.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    total, active = dict.fromkeys(runs, 0.0), dict(runs)
    for number in range(warm + repeats):
        for name, run in [*active.items()]:
            if number < warm and total[name] > longest / 10:
                continue
            try:
                spent = _once(run, inputs[number % len(inputs)], mode, device)
            # Out of memory, or a bug of another package: the other variants are measured all the same.
            except Exception as error:  # noqa: BLE001
                failed[name] = one_line(error)
            if name in failed:
                # Here and not in the handler, where the exception still holds the tensors of the failed step.
                release(device)
                del active[name], times[name]
                continue
            total[name] += spent / 1e3 if number else 0
            if number >= warm:
                times[name].append(spent)
                if total[name] > longest and len(times[name]) >= FEWEST:
                    del active[name]
    return times, failed


def _once(run: Run, inputs: Inputs, mode: str, device: str) -> float:
    timed, prepare = step(run, inputs, mode)
    if prepare:
        prepare()
    return milliseconds(timed, device)


def milliseconds(timed: Callable[[], object], device: str) -> float:
    """The time of one call: by events on CUDA, by the host's clock elsewhere."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        timed()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    timed()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def by_graph(run: Run, inputs: Sequence[Inputs], mode: str) -> list[float]:
    """Milliseconds of a step by replays of a CUDA graph over all inputs. Raises what a failed capture raises."""
    from triton.testing import do_bench_cudagraph

    steps = [step(run, some, mode)[0] for some in inputs]
    return [ms / len(steps) for ms in do_bench_cudagraph(lambda: [one() for one in steps], return_mode="all")]


def release(device: str) -> None:
    """Frees the memory of a failed step. Raises RuntimeError if a CUDA device does not answer any more."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def extra_bytes(run: Run, inputs: Inputs, small: Inputs, device: str) -> int:
    """Peak memory of forward and backward beyond the inputs and the returned gradients.

    small: inputs of a first step, after which libraries have allocated what they keep.
    """
    step(run, small, "full")[0]()
    returned = sum(leaf.numel() * leaf.element_size() for leaf in inputs.leaves)
    timed, _ = step(run, inputs, "full")
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        timed()
        return max(0, torch.cuda.max_memory_allocated(device) - before - returned)
    # The step could reuse freed memory that the allocator keeps, and would seem to need less.
    ctypes.CDLL(None).malloc_trim(0)
    # Resets the peak to the memory in use now. getrusage's peak would include the parent's.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _memory("VmRSS")
    timed()
    return max(0, _memory("VmHWM") - before - returned)


def _memory(field: str) -> int:
    """Bytes of this process in use now (VmRSS) or at most so far (VmHWM); Linux only."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("ascii").splitlines())
    return int(status[field].split()[0]) * 1024


def device_rates(dtype: torch.dtype, device: str, tiny: bool) -> tuple[float, float]:
    """(TFLOP/s of a large matrix product, GB/s read plus written by a large copy) on this device now."""
    size = 256 if tiny else 8192 if device.startswith("cuda") else 3072
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn((1 << 16) if tiny else (1 << 26), device=device)
    target = torch.empty_like(source)
    product, copy = (
        median([milliseconds(work, device) for _ in range(7)][2:])
        for work in (lambda: a @ b, lambda: target.copy_(source))
    )
    return 2 * size**3 / product / 1e9, 2 * source.numel() * 4 / copy / 1e6
