"""What the tuner asks the device: how long ops take with some tiles, and whether they still compute what they did."""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

import d2s.kernels as kernels
from d2s.kernels.bench import timing
from d2s.kernels.bench.cases import CASES, Inputs, Run, Shape
from d2s.kernels.build.descent import State, Times
from d2s.kernels.build.parts import text
from d2s.kernels.fused.tiles import entry, tuned_tiles

# Rows: so many that the device and not the host is what takes time; float32 has no tensor cores.
ROWS = {True: 32768, False: 8192}
# Rows of the check: no multiple of any tile, and more than the hinge takes another kernel for.
CHECKED = 1100
REPEATS = 15
# Seconds after which a variant is repeated no more.
LONGEST = 2.0
# How far results may lie from those of the defaults, in their norm: this finds what is broken, not what rounds.
FAR = 0.1


class Lost(Exception):
    """The device answers no more: a kernel has left its memory, say."""


def use(state: State, capability: tuple[int, int], width: int, half: bool) -> None:
    """Launches take these tiles from now on."""
    for name, tile in state.items():
        tuned_tiles()[entry(name, capability, width, half)] = dataclasses.asdict(tile)


def problem(op: str, width: int, dtype: torch.dtype, device: str, seed: int, rows: int = 0) -> Inputs:
    """Inputs of an op; GPO's width is the number of tokens. rows: of a small problem."""
    if op == "gpo":
        return _pooling(Shape(n=3 if rows else 64, tokens=width, width=512), dtype, device, seed)
    return CASES[op].make(Shape(n=rows or ROWS[dtype.itemsize == 2], width=width), dtype, device, seed)


def _pooling(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """GPO's, with weights as inputs: the GRU that makes them takes longer than the kernels that are tuned."""
    made = CASES["gpo"].make(shape, dtype, device, seed)
    features, mask = made.tensors["features"], made.tensors["mask"]
    weights = torch.full(mask.shape, 1 / shape.tokens, dtype=dtype, device=device, requires_grad=True)
    tensors = {"features": features, "weights": weights, "mask": mask}
    return Inputs(tensors=tensors, leaves=[features, weights], upstream=made.upstream)


def run_of(op: str) -> Run:
    """How an op is run."""
    if op != "gpo":
        return CASES[op].ours
    return lambda inputs: kernels.gpo_pool(*(inputs.tensors[k] for k in ("features", "weights", "mask")))


def stopwatch(
    ops: Sequence[str], width: int, half: bool, capability: tuple[int, int]
) -> Callable[[State, Collection[str]], Times]:
    """measure(state, ops): the milliseconds of forward and backward of each; infinite where it fails."""
    dtype = torch.bfloat16 if half else torch.float32
    inputs = {op: [problem(op, width, dtype, "cuda", seed) for seed in range(3)] for op in ops}

    def measure(state: State, wanted: Collection[str]) -> Times:
        use(state, capability, width, half)
        return {op: _median(op, inputs[op], state) for op in wanted}

    return measure


def _median(op: str, inputs: Sequence[Inputs], state: State) -> float:
    try:
        # Compiles, which is no part of its time.
        timing.step(run_of(op), inputs[0], "full")[0]()
        torch.cuda.synchronize()
        times = timing.in_turn({op: run_of(op)}, inputs, "full", REPEATS, 3, "cuda", LONGEST)[op]
    # Whatever a tile does to the launch, it is no candidate.
    except Exception as error:  # noqa: BLE001
        why = timing.reason(error)
    else:
        return timing.quantile(times, 0.5)
    print(f"  {op} with {text(state)}: {why}", flush=True)
    _still_there("cuda", f"{op} with {text(state)}: {why}")
    return float("inf")


def _still_there(device: str, after: str) -> None:
    """Gives memory back. Raises Lost where the device is beyond use."""
    try:
        timing.release(device)
    except Exception as error:
        raise Lost(f"the device answers no more after {after}") from error


def judge(
    ops: Sequence[str],
    width: int,
    half: bool,
    capability: tuple[int, int],
    defaults: State,
    device: str = "cuda",
) -> Callable[[State], list[str]]:
    """wrong(state): which ops fail with its tiles, or compute something else than with the defaults, in words.

    All types that share the tiles are run, on rows that fill no tile. Where the defaults fail, it need only run.
    """
    dtypes = (torch.bfloat16, torch.float16) if half else (torch.float32,)
    cases = {f"{op} {str(dtype).removeprefix('torch.')}": (op, dtype) for op in ops for dtype in dtypes}

    def results(state: State) -> dict[str, list[Tensor] | str]:
        use(state, capability, width, half)
        return {name: _results(op, width, dtype, device) for name, (op, dtype) in cases.items()}

    expected = results(defaults)

    def wrong(state: State) -> list[str]:
        found = []
        for name, got in results(state).items():
            if isinstance(got, str):
                found.append(f"{name}: {got}")
            elif not isinstance(expected[name], str):
                pairs = zip(got, expected[name], strict=True)
                if not all(_alike(a, b) for a, b in pairs):
                    found.append(f"{name}: gives something else than with the default tiles")
        if "hinge_sum" in ops and not found:
            found += [broken for dtype in dtypes for broken in broken_promise(width, dtype, device)]
        return found

    return wrong


def _results(op: str, width: int, dtype: torch.dtype, device: str) -> list[Tensor] | str:
    """An op's value and gradients, or why there are none."""
    try:
        inputs = problem(op, width, dtype, device, 0, CHECKED)
        value = run_of(op)(inputs)
        rest = torch.autograd.grad(value, inputs.leaves, inputs.upstream) if inputs.leaves else ()
        return [x.detach().double().cpu() for x in (value, *rest)]
    except Exception as error:  # noqa: BLE001
        why = timing.reason(error)
    _still_there(device, f"{op}: {why}")
    return why


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = (x.nan_to_num(posinf=0, neginf=0) for x in (a, b))
    return bool((a - b).norm() <= FAR * b.norm())


def broken_promise(width: int, dtype: torch.dtype, device: str) -> list[str]:
    """Empty if a negative that equals its positive violates a margin of 0 by exactly nothing.

    Every pair is there twice, and no other negative comes near: the hinge's sum is exactly 0.
    """
    generator = torch.Generator().manual_seed(0)
    image, noise = (normalize(torch.randn(CHECKED // 2, width, generator=generator), dim=1) for _ in range(2))
    partner = normalize(image + 0.1 * noise, dim=1)
    image, partner = (x.repeat(2, 1).to(dtype).to(device) for x in (image, partner))
    ids = torch.arange(CHECKED, device=device)
    loss = float(kernels.hinge_loss(image, partner, ids, margin=0.0, hardest=False))
    return [] if loss == 0 else [f"hinge_sum {dtype}: negatives equal to their positives cost {loss:g}"]
