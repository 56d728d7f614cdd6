"""What the tuner searches at a time, which tiles it may try there, and which of these build."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from d2s.kernels.build import builds
from d2s.kernels.build.descent import State, moves, tunable

if TYPE_CHECKING:
    from d2s.kernels.build.workers import Workers
    from d2s.kernels.fused.spec import KernelSpec
    from d2s.kernels.fused.tiles import Tile

# GPO's table goes by tokens: the lengths in use in the buckets that are not filled.
TOKENS = {64: 50, 1152: 577}

# Kernels that several ops launch, or whose name does not begin with their op's.
USERS = {
    "hinge_gather": ("hinge_max",),
    "positives": ("hinge_sum", "info_nce"),
    "products": ("hinge_sum", "info_nce", "sigmoid"),
}
# These compare similarities that one of them made with those of another, to the last bit: a negative equal to its
# positive violates a margin of 0 by exactly nothing. So they add up in the same chunks on the same units.
TOGETHER = ("positives", "info_nce_pairs", "hinge_sum_pairs")
# Launched for small batches alone, which are not what is measured: they keep their defaults.
SMALL = ("hinge_few",)
# Seconds, for the first guess: of one build, and of one candidate's launches, whose compilation is most of it.
BUILD, LAUNCH = 5.0, 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Kernels that are tuned together, and the ops that launch each."""

    specs: Mapping[str, "KernelSpec"]
    uses: Mapping[str, tuple[str, ...]]

    @property
    def ops(self) -> list[str]:
        """The ops of all of them."""
        return sorted({op for ops in self.uses.values() for op in ops})

    def __str__(self) -> str:
        return "+".join(self.ops)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What is searched at a time: a group's tiles for a width D and a size of type, on a device."""

    group: Group
    width: int
    half: bool
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.group} D={self.width} {'half' if self.half else 'float'}"

    def start(self, table: Mapping[str, Mapping[str, int]]) -> dict[str, "Tile"]:
        """The tiles that are in use: the table's, else the defaults."""
        from d2s.kernels.fused.tiles import Tile, default_tile, entry

        found = {}
        for name in self.group.specs:
            tuned = table.get(entry(name, self.capability, self.width, self.half))
            plain = default_tile(name, self.width, self.half, self.capability)
            found[name] = Tile(**tuned) if tuned else plain
        return found

    def around(self, state: State) -> Iterator[dict[str, "Tile"]]:
        """The states one step away, and those with a default of another device, as far as they keep TOGETHER."""
        from d2s.kernels.fused.tiles import LARGE, default_tile

        found = list(moves(self.group.specs, state, self.width, self.half, TOGETHER))
        for name in state:
            for other in LARGE:
                step = {**state, name: default_tile(name, self.width, self.half, other)}
                if step != state and step not in found:
                    found.append(step)
        yield from (step for step in found if alike(step, self.capability))


def alike(state: State, capability: tuple[int, int]) -> bool:
    """Whether TOGETHER make the same bits: by their chunks, and by the matrix unit that Triton takes."""

    def unit(tile: "Tile") -> bool:
        most = {9: 16, 10: 8}.get(capability[0], 0)
        return tile.rows >= 64 and 4 <= tile.warps <= most

    return len({(state[name].depth, unit(state[name])) for name in TOGETHER if name in state}) <= 1


def text(state: State) -> str:
    """Tiles by kernel, in one line."""
    return ", ".join(
        f"{name} {t.rows}x{t.columns}x{t.depth}/{t.warps}w{t.stages}s" for name, t in state.items()
    )


def users(kernel: str, ops: Sequence[str]) -> tuple[str, ...]:
    """The benchmarks that launch a kernel, else by its name: `hinge_max_sweep` belongs to `hinge_max`."""
    longest = max((op for op in ops if kernel.startswith(op)), key=len, default=None)
    return USERS.get(kernel) or ((longest,) if longest else ())


def groups(kernels: Sequence[str] | None = None) -> list[Group]:
    """The kernels to tune. Raises ValueError for one whose op has no benchmark, or that cannot be tuned."""
    from d2s.kernels.bench.cases import CASES
    from d2s.kernels.fused import ALL_SPECS

    specs = {spec.name: spec for spec in ALL_SPECS if tunable(spec) and spec.name not in SMALL}
    if unknown := [name for name in kernels or () if name not in specs]:
        raise ValueError(f"no tile of {', '.join(unknown)}; there are {', '.join(specs)}")
    wanted = {*(kernels or specs)}
    # Those whose depth must be the same can change it only at once.
    wanted |= {*TOGETHER} if wanted & {*TOGETHER} else set()
    found: list[dict[str, tuple[str, ...]]] = []
    for name in (name for name in specs if name in wanted):
        uses = {name: users(name, tuple(CASES))}
        if not uses[name]:
            raise ValueError(f"{name}: no benchmark's name begins its name")
        for other in [g for g in found if {op for ops in g.values() for op in ops} & {*uses[name]}]:
            found.remove(other)
            uses = other | uses
        found.append(uses)
    return [Group(specs={name: specs[name] for name in uses}, uses=uses) for uses in found]


def usable(states: Sequence[State], state: State, part: Part, workers: "Workers") -> list[State]:
    """Those of states whose kernels, as far as they differ from state's, build, fit and do not spill.

    So must the kernels that take another's tile, at every width of its bucket that is compiled ahead of time.
    """
    wanted = {
        (name, tile): _jobs(name, tile, part)
        for other in states
        for name, tile in other.items()
        if tile != state[name]
    }
    todo = [job for jobs in wanted.values() for job in jobs]
    bad = {built.job for built in workers.build(todo) if _unfit(built)}
    fit = {key for key, jobs in wanted.items() if not bad & {*jobs}}
    return [other for other in states if all(key in fit or key[1] == state[key[0]] for key in other.items())]


def _jobs(name: str, tile: "Tile", part: Part) -> list[builds.Job]:
    from d2s.kernels.fused.tiles import bucket

    dtype, arch = "bf16" if part.half else "fp32", 10 * part.capability[0] + part.capability[1]
    return [
        builds.Job(kernel=spec.name, tile=tile, width=width, dtype=dtype, arch=arch)
        for spec in builds.all_specs().values()
        if name in (spec.name, spec.row) and dtype in spec.dtypes
        for width in sorted({part.width, *(w for w in spec.widths if bucket(w) == bucket(part.width))})
    ]


def _unfit(built: builds.Built) -> bool:
    # float32 on tensor cores would be fast, and rounded to 10 bits.
    rounded = built.figures is not None and built.job.dtype == "fp32" and built.figures.tensor_core > 0
    return rounded or bool(builds.faults(built, {}, dots=False))


def guess(part: Part, processes: int) -> tuple[int, float]:
    """(candidates, seconds) of a first round."""
    start = part.start({})
    changed = [[name for name, tile in state.items() if tile != start[name]] for state in part.around(start)]
    jobs = sum(len(_jobs(name, start[name], part)) for names in changed for name in names)
    launches = sum(len({op for name in names for op in part.group.uses[name]}) for names in changed)
    return len(changed), BUILD * jobs / processes + LAUNCH * launches
