"""Measures time and peak memory. Variants run in turn. Inputs are not in the cache when a timed call starts."""

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
# Assumed size of the last-level cache in bytes, if the device does not report the size.
CACHE = 64 << 20
MOST_SETS = 64
# Least number of repeats of a slow variant.
FEWEST = 3


def step(run: Run, inputs: Inputs, mode: str) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """Returns the function to time, and a function to call before it without timing (None if not needed)."""
    if mode == "forward" or not inputs.leaves:
        return lambda: run(inputs), None
    # A variant may have its own function `gradients`.
    gradients = getattr(run, "gradients", lambda value, inputs: inputs.gradients(value))
    if mode == "full":
        return lambda: gradients(run(inputs), inputs), None
    values: list[Tensor] = []
    return lambda: gradients(values.pop(), inputs), lambda: values.append(run(inputs))


def sets_needed(nbytes: int, device: str) -> int:
    """Returns how many input sets of `nbytes` bytes to use in turn, so that a set leaves the cache between uses."""
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
    """Times the variants in turn. Each round uses the next set of inputs.

    Returns the milliseconds of every repeat by variant, and the error messages of the variants that failed.
    There are `warm` rounds of warm-up, then `repeats` timed rounds. A variant stops once it has FEWEST
    repeats and has run for `longest` seconds, not counting the first round. Its warm-up gets a tenth of this time.
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
            # An error, such as too little memory, must not keep the other variants from being measured.
            except Exception as error:  # noqa: BLE001
                failed[name] = one_line(error)
            if name in failed:
                # Not inside the handler, because there the exception still holds the tensors of the failed call.
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
    """Returns the time of one call of `timed` in ms. Uses CUDA events on a GPU, else the host's clock."""
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
    """Returns the times of one call in ms, from replays of a CUDA graph. Raises any exception of the capture."""
    from triton.testing import do_bench_cudagraph

    steps = [step(run, some, mode)[0] for some in inputs]
    return [ms / len(steps) for ms in do_bench_cudagraph(lambda: [one() for one in steps], return_mode="all")]


def release(device: str) -> None:
    """Frees the memory of a failed call. Raises RuntimeError if the CUDA device is no longer usable."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def extra_bytes(run: Run, inputs: Inputs, small: Inputs, device: str) -> int:
    """Returns the peak memory of forward and backward in bytes, not counting inputs and returned gradients.

    small: small inputs for a first call, in which libraries allocate buffers that they keep.
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
    # Gives freed memory back to the system. If the call reused this memory, its peak would seem lower.
    ctypes.CDLL(None).malloc_trim(0)
    # Sets the process's peak (VmHWM) to its current memory. The peak that getrusage reports cannot be reset.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _memory("VmRSS")
    timed()
    return max(0, _memory("VmHWM") - before - returned)


def _memory(field: str) -> int:
    """Returns the current ("VmRSS") or the peak ("VmHWM") memory of this process in bytes. Linux only."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("ascii").splitlines())
    return int(status[field].split()[0]) * 1024


def device_rates(dtype: torch.dtype, device: str, tiny: bool) -> tuple[float, float]:
    """Returns the TFLOP/s of a matrix product and the GB/s (read plus written) of a copy. tiny: use small tensors."""
    size = 256 if tiny else 8192 if device.startswith("cuda") else 3072
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn((1 << 16) if tiny else (1 << 26), device=device)
    target = torch.empty_like(source)
    product, copy = (
        median([milliseconds(work, device) for _ in range(7)][2:])
        for work in (lambda: a @ b, lambda: target.copy_(source))
    )
    return 2 * size**3 / product / 1e9, 2 * source.numel() * 4 / copy / 1e6
