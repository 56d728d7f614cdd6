"""How it is measured: inputs that are not in a cache, variants in turn, the device's clock, peak memory."""

import ctypes
import gc
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from d2s.kernels.bench.cases import Inputs, Run

MODES = ("full", "forward", "backward")
# Where a device does not tell the size of its last cache level.
CACHE = 64 << 20
MOST_SETS = 64
# The least repeats of what takes long.
FEWEST = 3


def step(run: Run, inputs: Inputs, mode: str) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """(what is timed, what runs before it without being timed) of one step in a mode."""
    if mode == "forward" or not inputs.leaves:
        return lambda: run(inputs), None
    # A variant may have its own way to differentiate.
    gradients = getattr(run, "gradients", _gradients)
    if mode == "full":
        return lambda: gradients(run(inputs), inputs), None
    held: list[Tensor] = []

    def prepare() -> None:
        held.append(run(inputs))

    return lambda: gradients(held.pop(), inputs), prepare


def _gradients(value: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs.leaves, inputs.upstream)


def sets_needed(one: int, device: str) -> int:
    """How many sets of inputs of that many bytes push each other out of the last cache level."""
    if device.startswith("cuda"):
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", CACHE)
    else:
        file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
        text = file.read_text(encoding="ascii").strip() if file.is_file() else ""
        cache = int(text[:-1]) << 10 if text.endswith("K") else CACHE
    return min(max(2, math.ceil(2 * cache / max(one, 1))), MOST_SETS)


def in_turn(
    runs: dict[str, Run],
    inputs: Sequence[Inputs],
    mode: str,
    repeats: int,
    warm: int,
    device: str,
    longest: float = math.inf,
    refused: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of every repeat of every variant; they take turns, each round with the next inputs.

    A variant leaves after `longest` seconds, but not before FEWEST repeats, and is warm after a tenth of that. One
    that raises leaves with its reason in `refused`; without that dictionary the exception is the caller's.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    total, going = dict.fromkeys(runs, 0.0), dict(runs)
    for number in range(warm + repeats):
        for name, run in [*going.items()]:
            if number < warm and total[name] > longest / 10:
                continue
            try:
                spent = _once(run, inputs[number % len(inputs)], mode, device)
            except Exception as error:
                if refused is None:
                    raise
                refused[name] = reason(error)
                del going[name], times[name]
                continue
            total[name] += spent / 1e3
            if number >= warm:
                times[name].append(spent)
                if total[name] > longest and len(times[name]) >= FEWEST:
                    del going[name]
    return times


def _once(run: Run, inputs: Inputs, mode: str, device: str) -> float:
    timed, prepare = step(run, inputs, mode)
    if prepare:
        prepare()
    return _events(timed) if device.startswith("cuda") else _wall(timed)


def reason(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _wall(timed: Callable[[], object]) -> float:
    start = time.perf_counter()
    timed()
    return 1e3 * (time.perf_counter() - start)


def _events(timed: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    timed()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def graph_of(run: Run, inputs: Sequence[Inputs], mode: str) -> Callable[[], None]:
    """A CUDA graph that steps once over every set of inputs. Raises what a capture raises."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for some in inputs[:3]:
            step(run, some, mode)[0]()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for some in inputs:
            step(run, some, mode)[0]()
    return graph.replay


def graphs_in_turn(
    runs: dict[str, Run], inputs: Sequence[Inputs], mode: str, repeats: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """As `in_turn`, by replays of CUDA graphs, a step's share each; and why the others could not be captured."""
    graphs, refused = {}, {}
    for name, run in runs.items():
        try:
            graphs[name] = graph_of(run, inputs, mode)
        # A provider that waits for the host, or allocates on its own, cannot be captured: that is a finding.
        except Exception as error:  # noqa: BLE001
            torch.cuda.synchronize()
            refused[name] = reason(error)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(repeats + 1):
        for name, replay in graphs.items():
            spent = _events(replay) / len(inputs)
            if number:
                times[name].append(spent)
    return times, refused


def quantile(values: Sequence[float], q: float) -> float:
    """Linearly between the sorted values."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def release(device: str) -> None:
    """Gives the memory of a step that failed back. Raises where a CUDA device does not answer any more."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def extra_bytes(run: Run, inputs: Inputs, small: Inputs, device: str) -> int:
    """The most memory in use during forward and backward beyond the inputs and the gradients that come back.

    small: inputs for a first step, after which libraries hold what they will hold.
    """
    step(run, small, "full")[0]()
    own = sum(leaf.numel() * leaf.element_size() for leaf in inputs.leaves)
    timed, _ = step(run, inputs, "full")
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        timed()
        return max(0, torch.cuda.max_memory_allocated(device) - before - own)
    # What was freed but is still held by the allocator would hide as much of the step's own need.
    ctypes.CDLL(None).malloc_trim(0)
    # Sets the high-water mark back to what is in use now; getrusage's mark would be the parent's.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _memory("VmRSS")
    timed()
    return max(0, _memory("VmHWM") - before - own)


def _memory(field: str) -> int:
    """VmRSS (bytes in use now) or VmHWM (the most so far) of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{field}: not in /proc/self/status; peak memory is measured on Linux only")


def ceilings(dtype: torch.dtype, device: str, tiny: bool) -> tuple[float, float]:
    """(TFLOP/s of a large matrix product, GB/s read plus written by a large copy) on this device, now."""
    size = 256 if tiny else 8192 if device.startswith("cuda") else 3072
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock = _events if device.startswith("cuda") else _wall
    product = quantile([clock(lambda: a @ b) for _ in range(7)][2:], 0.5)
    source = torch.randn((1 << 16) if tiny else (1 << 26), device=device)
    target = torch.empty_like(source)
    copy = quantile([clock(lambda: target.copy_(source)) for _ in range(7)][2:], 0.5)
    return 2 * size**3 / product / 1e9, 2 * source.numel() * 4 / copy / 1e6
