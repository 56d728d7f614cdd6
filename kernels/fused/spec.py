"""Describes a Triton kernel for ahead-of-time compilation and for the tuner."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from d2s.kernels.fused.tiles import Tile


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """The description of a kernel, from which `d2s.kernels.compile` builds it without a device.

    name: the kernel's name, also in the tile table. kernel: the `@triton.jit` function. pointers: maps an
    argument to its Triton type ("*fp32", "*i64", "*i1"; "*x" is the type of the embeddings). scalars: maps an
    argument to its type ("i32", "fp32"). constants: returns the constexpr arguments for a tile, a width D and
    whether the embeddings have 16 bits. unaligned: pointers and scalars that may not be divisible by 16.
    dots: whether 16-bit variants must use tensor cores. widths: the values of D to compile for. dtypes: the
    types to use for "*x". row: the name of another kernel whose tile this kernel uses, because it has to
    repeat that kernel's sums. options: returns launch options that differ from the tile's.
    """

    name: str
    kernel: object
    pointers: Mapping[str, str]
    scalars: Mapping[str, str]
    constants: Callable[[Tile, int, bool], dict[str, object]]
    unaligned: frozenset[str] = field(default_factory=frozenset)
    dots: bool = True
    widths: tuple[int, ...] = (64, 512, 1152)
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    row: str = ""
    options: Callable[[Tile, int, bool], dict[str, int]] | None = None

    @property
    def tile_name(self) -> str:
        """The name under which the tile table has this kernel's tile."""
        return self.row or self.name

    def launch_options(self, tile: Tile, width: int, half: bool) -> dict[str, int]:
        """Returns the options for launching the kernel."""
        own = self.options(tile, width, half) if self.options else {}
        return {"num_warps": tile.warps, "num_stages": tile.stages, **own}
