"""The search for tiles: one step at a time, as long as steps gain."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2s.kernels.fused.spec import KernelSpec
    from d2s.kernels.fused.tiles import Tile

NOISE = 0.02
ROUNDS = 2
LOWEST = {"rows": 16, "columns": 16, "depth": 16, "warps": 1, "stages": 1}
HIGHEST = {"rows": 1024, "columns": 256, "depth": 256, "warps": 16, "stages": 5}

State = Mapping[str, "Tile"]


def steps(spec: "KernelSpec", tile: "Tile", width: int, half: bool) -> list["Tile"]:
    """The tiles one step away that build something else, the depth apart."""
    found = {}
    for name in ("rows", "columns", "warps", "stages"):
        value = getattr(tile, name)
        for other in (value - 1, value + 1) if name == "stages" else (value // 2, value * 2):
            if LOWEST[name] <= other <= HIGHEST[name]:
                step = dataclasses.replace(tile, **{name: other})
                found.setdefault(_build_of(spec, step, width, half), step)
    found.pop(_build_of(spec, tile, width, half), None)
    return list(found.values())


def _build_of(spec: "KernelSpec", tile: "Tile", width: int, half: bool) -> tuple:
    own = spec.options(tile, width, half) if spec.options else {}
    options = {"num_warps": tile.warps, "num_stages": tile.stages, **own}
    return tuple(options.items()), tuple(spec.constants(tile, width, half).items())


def tunable(spec: "KernelSpec") -> bool:
    """Whether a kernel's build follows from a tile of its own: the others have no entry in the table."""
    from d2s.kernels.fused.tiles import Tile

    if spec.row not in ("", spec.name):
        return False
    one = Tile(rows=16, columns=16, depth=16, warps=4, stages=1)
    other = Tile(rows=32, columns=64, depth=128, warps=4, stages=1)
    return spec.constants(one, 256, True) != spec.constants(other, 256, True)


def moves(
    specs: Mapping[str, "KernelSpec"], state: State, width: int, half: bool
) -> Iterator[dict[str, "Tile"]]:
    """The states one step away from a state."""
    for name, tile in state.items():
        for step in steps(specs[name], tile, width, half):
            yield {**state, name: step}
    depths = {tile.depth for tile in state.values()}
    for depth in sorted({d for old in depths for d in (old // 2, old * 2)} - depths):
        if LOWEST["depth"] <= depth <= HIGHEST["depth"]:
            yield {name: dataclasses.replace(tile, depth=depth) for name, tile in state.items()}


def descend(
    start: State,
    around: Callable[[State], Iterator[dict[str, "Tile"]]],
    usable: Callable[[Sequence[State], State], list[State]],
    measure: Callable[[State], float],
) -> tuple[State, float, float]:
    """(best state, its time, the start's time): takes every step that gains more than NOISE, ROUNDS times over."""
    best, first = start, measure(start)
    fastest = first
    for _ in range(ROUNDS):
        before = best
        for candidate in usable(list(around(best)), best):
            # A step was made from the state at the start of the round: only what it changes is tried.
            changed = {name: tile for name, tile in candidate.items() if tile != before[name]}
            trial = {**best, **changed}
            spent = measure(trial)
            if spent < fastest * (1 - NOISE):
                best, fastest = trial, spent
        if best == before:
            break
    return best, fastest, first
