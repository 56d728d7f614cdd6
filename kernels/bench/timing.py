"""How it is measured: inputs that are not in a cache, variants in turn, the device's clock, peak memory."""

import ctypes
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


def step(run: Run, inputs: Inputs, mode: str) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """(what is timed, what runs before it without being timed) of one step in a mode."""
    if mode == "forward" or not inputs.leaves:
        return lambda: run(inputs), None
    if mode == "full":
        return lambda: torch.autograd.grad(run(inputs), inputs.leaves, inputs.upstream), None
    held: list[Tensor] = []

    def prepare() -> None:
        held.append(run(inputs))

    return lambda: torch.autograd.grad(held.pop(), inputs.leaves, inputs.upstream), prepare


def sets_needed(one: int, device: str) -> int:
    """How many sets of inputs of that many bytes push each other out of the last cache level."""
    if device.startswith("cuda"):
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
        text = file.read_text(encoding="ascii").strip() if file.is_file() else ""
        cache = int(text[:-1]) << 10 if text.endswith("K") else CACHE
    return min(max(2, math.ceil(2 * cache / max(one, 1))), MOST_SETS)


def in_turn(
    runs: dict[str, Run], inputs: Sequence[Inputs], mode: str, repeats: int, warm: int, device: str
) -> dict[str, list[float]]:
    """Milliseconds of every repeat of every variant; they take turns, each round with the next inputs."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    one = _events if device.startswith("cuda") else _wall
    for number in range(warm + repeats):
        for name, run in runs.items():
            timed, prepare = step(run, inputs[number % len(inputs)], mode)
            if prepare:
                prepare()
            spent = one(timed)
            if number >= warm:
                times[name].append(spent)
    return times


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
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
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


def extra_bytes(run: Run, inputs: Inputs, small: Inputs, device: str) -> int:
    """The most memory in use during forward and backward beyond the inputs and the gradients that come back.

    small: inputs for a first step, after which libraries hold what they will hold.
    """
    torch.autograd.grad(run(small), small.leaves, small.upstream) if small.leaves else run(small)
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
