"""Measures the times and the extra memory of all variants of one case at one size."""

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context

import numpy as np
import torch

from d2s.kernels.bench import plan, record, timing
from d2s.kernels.bench.cases import CASES, work
from d2s.kernels.bench.providers import Unavailable, provider
from d2s.kernels.problems import Run, one_line

# Up to this n, launching kernels takes longer than running them. So variants are also timed as CUDA graphs.
LAUNCH_BOUND = 1024


def variants(item: plan.Item, arguments: argparse.Namespace) -> dict[str, Run]:
    """Returns the variants that support the case, by name. With --provider, prints why a variant does not."""
    found = {}
    for name in plan.providers(arguments):
        try:
            found[name] = provider(name, item.case, arguments.device, item.shape.width)
        except Unavailable as error:
            if arguments.provider:
                print(f"  {error}", flush=True)
    return found


def peak_bytes(name: str, item: plan.Item, device: str, run: Run | None = None) -> int:
    """Returns the peak memory of a variant in bytes (see `timing.extra_bytes`). run: its function, if known."""
    make, dtype = CASES[item.case].make, plan.DTYPES[item.dtype]
    run = run or provider(name, item.case, device, item.shape.width)
    small = make(replace(item.shape, n=min(item.shape.n, 64)), dtype, device, 0)
    return timing.extra_bytes(run, make(item.shape, dtype, device, 0), small, device)


def extra_mib(name: str, item: plan.Item, device: str, run: Run) -> float | None:
    """Returns `peak_bytes` of a variant in MiB. If the measurement fails, prints the error and returns None."""
    try:
        if device.startswith("cuda"):
            return peak_bytes(name, item, device, run) / 2**20
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            return process.submit(peak_bytes, name, item, device).result() / 2**20
    # Another package may refuse the small inputs, or the process may be killed. The times must be kept anyway.
    except Exception as error:  # noqa: BLE001
        print(f"  {name}: peak memory: {one_line(error)}")
    timing.release(device)
    return None


def measure(item: plan.Item, rates: tuple[float, float], arguments: argparse.Namespace) -> list[record.Row]:
    """Measures one item. Returns a row for each variant, mode and clock. rates: see `timing.device_rates`."""
    make, dtype, device = CASES[item.case].make, plan.DTYPES[item.dtype], arguments.device
    first, on_gpu = make(item.shape, dtype, device, 0), device.startswith("cuda")
    count = timing.sets_needed(first.nbytes(), device)
    inputs = [first, *(make(item.shape, dtype, device, seed) for seed in range(1, count))]
    runs, rows = variants(item, arguments), []

    def add(mode: str, name: str, clock: str, spent: list[float], extra: float | None = None) -> None:
        """Adds a row. clock: see `Row.timing`. spent: the ms of each repeat. extra: extra memory in MiB."""
        least = work(item.case, item.shape, dtype, mode)
        p20, median, p80 = np.quantile(spent, (0.2, 0.5, 0.8)).tolist()
        what = {"case": item.case, "mode": mode, "provider": name, "dtype": item.dtype, **asdict(item.shape)}
        times = {"timing": clock, "repeats": len(spent), "median_ms": median, "p20_ms": p20, "p80_ms": p80}
        row = record.Row(
            **record.circumstances(device),
            **what,
            **times,
            extra_mib=extra,
            tflops=least.flops / median / 1e9,
            matmul_tflops=rates[0],
            copy_gbs=rates[1],
            floor_ms=least.floor_ms(*rates),
        )
        rows.append(row)

    for mode in plan.modes(item.case, arguments):
        limits = arguments.repeat, arguments.warm, device, arguments.longest
        times, failed = timing.in_turn(runs, inputs, mode, *limits)
        for name, why in failed.items():
            print(f"  {name}: {mode}: {why}", flush=True)
            del runs[name]
        for name, spent in times.items():
            extra = extra_mib(name, item, device, runs[name]) if mode == "full" else None
            add(mode, name, "events" if on_gpu else "wall", spent, extra)
        for name in times if on_gpu and item.shape.n <= LAUNCH_BOUND and mode != "backward" else ():
            try:
                add(mode, name, "graph", timing.by_graph(runs[name], inputs, mode))
            # A variant that waits for the host or allocates memory outside torch cannot be captured.
            except Exception as error:  # noqa: BLE001
                print(f"  {name}: no CUDA graph: {one_line(error)}")
                torch.cuda.synchronize(device)
    return rows
