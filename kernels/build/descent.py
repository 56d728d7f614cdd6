"""The search for tiles: one step at a time, as long as steps gain, and none in the end with which anything fails."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2s.kernels.fused.spec import KernelSpec
    from d2s.kernels.fused.tiles import Tile

NOISE = 0.02
ROUNDS = 2
LOWEST = {"rows": 16, "columns": 16, "depth": 16, "warps": 1, "stages": 1}
HIGHEST = {"rows": 1024, "columns": 256, "depth": 512, "warps": 16, "stages": 5}

State = Mapping[str, "Tile"]
# Milliseconds of each op.
Times = dict[str, float]


def steps(spec: "KernelSpec", tile: "Tile", width: int, half: bool, depth: bool = True) -> list["Tile"]:
    """The tiles one step away that build something else; depth: it may change, too."""
    found = {}
    for name in ("rows", "columns", "warps", "stages", *(("depth",) if depth else ())):
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
    specs: Mapping[str, "KernelSpec"],
    state: State,
    width: int,
    half: bool,
    together: Collection[str] = (),
) -> Iterator[dict[str, "Tile"]]:
    """The states one step away from a state; the kernels of `together` change their depth at once."""
    for name, tile in state.items():
        for step in steps(specs[name], tile, width, half, depth=name not in together):
            yield {**state, name: step}
    joint = {name: tile for name, tile in state.items() if name in together}
    depths = {tile.depth for tile in joint.values()}
    for depth in sorted({d for old in depths for d in (old // 2, old * 2)} - depths):
        if LOWEST["depth"] <= depth <= HIGHEST["depth"]:
            yield {**state, **{n: dataclasses.replace(t, depth=depth) for n, t in joint.items()}}


def descend(
    start: State,
    around: Callable[[State], Iterator[dict[str, "Tile"]]],
    usable: Callable[[Sequence[State], State], list[State]],
    measure: Callable[[State, Collection[str]], Times],
    uses: Mapping[str, Collection[str]],
    over: Callable[[], bool] = lambda: False,
) -> tuple[State, Times, Times]:
    """(best state, its times, the start's times): takes every step that gains more than NOISE, ROUNDS times over.

    uses: the ops of each kernel; a step is judged by those of the kernels that it changes. over: whether to stop.
    """
    best, first = start, measure(start, sorted({op for ops in uses.values() for op in ops}))
    times = dict(first)
    for _ in range(ROUNDS):
        before = best
        for candidate in [] if over() else usable(list(around(best)), best):
            if over():
                break
            # A step was made from the state at the start of the round: only what it changes is tried.
            changed = {name: tile for name, tile in candidate.items() if tile != before[name]}
            trial = {**best, **changed}
            spent = measure(trial, sorted({op for name in changed for op in uses[name]}))
            if sum(spent.values()) < (1 - NOISE) * sum(times[op] for op in spent):
                best, times = trial, {**times, **spent}
        if best == before:
            break
    return best, times, first


def settle(
    defaults: State, best: State, wrong: Callable[[State], list[str]], together: Collection[str] = ()
) -> tuple[State, dict[str, list[str]]]:
    """(what of best can be kept, what is wrong with the kernels left out): wrong says what a state breaks.

    Where best is not sound, its tiles are added to the defaults one after the other, those of `together` at once.
    """
    if not wrong(best):
        return best, {}
    kept: State = dict(defaults)
    left: dict[str, list[str]] = {}
    units = [[name for name in best if name in together], *([n] for n in best if n not in together)]
    for unit in units:
        changed = {name: best[name] for name in unit if best[name] != kept[name]}
        found = wrong({**kept, **changed}) if changed else []
        if found:
            left[", ".join(changed)] = found
        else:
            kept = {**kept, **changed}
    return kept, left
