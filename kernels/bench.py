"""`python -m d2s.kernels.bench`: ours against plain implementations of the method, side by side in one run.

The plain ones do what the paper's release does: the N x N matrix with masked fills, and GPO with its GRU run once
per sample and torch.sort. Each case runs in two ways in turn, forward and backward, and the median counts.
Peak memory is the process' high-water mark above what it held before the step, each in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import d2s.kernels as kernels

Step = Callable[[], None]
SIZES = {"hinge": (8192, 512), "gpo": (128, 577, 512)}
QUICK_SIZES = {"hinge": (2048, 256), "gpo": (32, 145, 128)}
TEMPERATURE = 0.1
CODE = 32


def _sides(n: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Image and text embeddings of a model half trained (positives at 0.5), two captions an image at times."""
    g = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(n, width, generator=g), dim=1)
    text = normalize(image + 3**0.5 * normalize(torch.randn(n, width, generator=g), dim=1), dim=1)
    ids = torch.arange(n) - (torch.arange(n) % 16 == 1).long()
    return image.to(device).requires_grad_(), text.to(device).requires_grad_(), ids.to(device)


def _dense_hinge(image: Tensor, text: Tensor, ids: Tensor, hardest: bool) -> Tensor:
    s = image @ text.t()
    matched = s.diag()
    same = ids[:, None] == ids[None, :]
    rows = (0.2 + s - matched[:, None]).clamp(min=0).masked_fill(same, 0)
    columns = (0.2 + s - matched[None, :]).clamp(min=0).masked_fill(same, 0)
    if hardest:
        return rows.max(1).values.sum() + columns.max(0).values.sum()
    return rows.sum() + columns.sum()


def _dense_info_nce(image: Tensor, text: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    n = ids.shape[0]
    label = torch.arange(n, device=ids.device)
    other = (ids[:, None] == ids[None, :]) & ~torch.eye(n, dtype=torch.bool, device=ids.device)
    z = (scale * image @ text.t()).masked_fill(other, -torch.inf)
    return (cross_entropy(z, label, reduction="sum") + cross_entropy(z.t(), label, reduction="sum")) / 2


def _contrastive_step(name: str, ours: bool, size: tuple[int, ...], device: str) -> Step:
    image, text, ids = _sides(*size, device)
    scale = torch.tensor([1 / 0.07], device=device, requires_grad=True)

    def step() -> None:
        if name == "info_nce":
            loss = (
                kernels.info_nce_loss(image, text, ids, scale=scale)
                if ours
                else _dense_info_nce(image, text, ids, scale)
            )
        else:
            hardest = name == "hinge_max"
            loss = (
                kernels.hinge_loss(image, text, ids, hardest=hardest)
                if ours
                else _dense_hinge(image, text, ids, hardest)
            )
        loss.backward()
        image.grad = text.grad = scale.grad = None

    return step


class _Weights(nn.Module):
    """GPO's weights (n, K) from position codes (n, K, 32), as in the paper."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(CODE, CODE, 1, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(CODE, 1, bias=False)

    def forward(self, code: Tensor) -> Tensor:
        hidden = self.gru(code)[0]
        mean = (hidden[..., :CODE] + hidden[..., CODE:]) / 2
        return torch.softmax(self.linear(mean).squeeze(2) / TEMPERATURE, dim=1)


def _position_code(tokens: int) -> Tensor:
    """Sinusoids (K, 32)."""
    angle = torch.arange(tokens)[:, None] * torch.exp(torch.arange(0, CODE, 2) * (-9.21 / CODE))
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


def _gpo_step(ours: bool, size: tuple[int, ...], device: str) -> Step:
    batch, tokens, width = size
    torch.manual_seed(0)
    features = torch.randn(size).to(device).requires_grad_()
    weights_of = _Weights().to(device)
    code = _position_code(tokens).to(device)
    mask = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    upstream = torch.randn(batch, width).to(device)

    def step() -> None:
        if ours:
            pooled = kernels.gpo_pool(features, weights_of(code[None]).expand(batch, tokens), mask)
        else:
            weights = weights_of(code.expand(batch, tokens, CODE))
            filled = features.masked_fill(~mask[:, :, None], -10000.0)
            ordered = filled.sort(dim=1, descending=True).values.masked_fill(~mask[:, :, None], 0)
            pooled = (ordered * weights[:, :, None]).sum(1)
        pooled.backward(upstream)
        features.grad = None
        weights_of.zero_grad()

    return step


def make_step(case: str, ours: bool, quick: bool, device: str) -> Step:
    """One forward and backward of a case, by our way or the plain one."""
    sizes = QUICK_SIZES if quick else SIZES
    if case == "gpo":
        return _gpo_step(ours, sizes["gpo"], device)
    return _contrastive_step(case, ours, sizes["hinge"], device)


CASES = ("hinge_max", "hinge_sum", "info_nce", "gpo")


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _seconds(step: Step, device: str) -> float:
    _synchronise(device)
    start = time.perf_counter()
    step()
    _synchronise(device)
    return time.perf_counter() - start


def _memory(field: str) -> int:
    """VmRSS (bytes in use now) or VmHWM (the most so far) of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{field}: not in /proc/self/status; peak memory is measured on Linux only")


def peak_bytes(step: Step, device: str) -> int:
    """The most memory in use during one step above what was in use before it."""
    if device.startswith("cuda"):
        step()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # Sets the high-water mark back to what is in use now; getrusage's mark would be the parent's.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _memory("VmRSS")
    step()
    return _memory("VmHWM") - before


def _peak_apart(case: str, ours: bool, arguments: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "d2s.kernels.bench", "--device", arguments.device]
    command += ["--peak", f"{case}:{int(ours)}", *(["--quick"] if arguments.quick else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    return int(done.stdout.split()[-1])


def measure(case: str, arguments: argparse.Namespace) -> dict[str, float | str]:
    """Median seconds and peak bytes of both ways, in turn, after one step each to warm up."""
    steps = {ours: make_step(case, ours, arguments.quick, arguments.device) for ours in (True, False)}
    times: dict[bool, list[float]] = {True: [], False: []}
    for round_number in range(arguments.repeat + 1):
        for ours, step in steps.items():
            spent = _seconds(step, arguments.device)
            if round_number:
                times[ours].append(spent)
    ours, plain = (statistics.median(times[key]) for key in (True, False))
    ours_peak, plain_peak = (_peak_apart(case, key, arguments) for key in (True, False))
    return {
        "case": case,
        "ours_s": ours,
        "plain_s": plain,
        "faster": plain / ours,
        "ours_bytes": ours_peak,
        "plain_bytes": plain_peak,
        "less_memory": plain_peak / max(ours_peak, 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Prints the table, and JSON lines to a file where one is asked for."""
    parser = argparse.ArgumentParser(prog="python -m d2s.kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all")
    parser.add_argument("--repeat", type=int, default=3, help="timed rounds after the first")
    parser.add_argument("--only", choices=CASES, action="append", help="these cases alone")
    parser.add_argument("--json", type=Path, help="append one JSON line a case to this file")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.peak:
        case, ours = arguments.peak.split(":")
        print(peak_bytes(make_step(case, ours == "1", arguments.quick, arguments.device), arguments.device))
        return 0
    sizes = QUICK_SIZES if arguments.quick else SIZES
    print(
        f"{arguments.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32;", end=" "
    )
    print(f"losses at N x D = {sizes['hinge']}, GPO at B x K x D = {sizes['gpo']}; forward and backward")
    print(f"{'':10} {'ours s':>8} {'plain s':>8} {'faster':>7} {'ours MB':>8} {'plain MB':>9} {'less':>6}")
    for case in arguments.only or CASES:
        row = measure(case, arguments)
        print(
            f"{case:10} {row['ours_s']:8.3f} {row['plain_s']:8.3f} {row['faster']:6.1f}x"
            f" {row['ours_bytes'] / 1e6:8.1f} {row['plain_bytes'] / 1e6:9.1f} {row['less_memory']:5.1f}x",
            flush=True,
        )
        if arguments.json:
            with arguments.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "quick": arguments.quick, "device": arguments.device}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
