"""Describes a Triton kernel for ahead-of-time compilation and for the tuner."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from d2s.kernels.fused.tiles import Tile

# The pointers that have the same type in all kernels.
COMMON = {"image": "*x", "text": "*x", "ds": "*x", "image_ids": "*i64", "text_ids": "*i64"}


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """The description of a kernel, from which `d2s.kernels.compile` builds it without a device.

    name: the kernel's name, also in the tile table. kernel: the `@triton.jit` function; its arguments that are not
    specialized have the type "i32". pointers: maps an argument to its Triton type ("*fp32", "*i64", "*i1"; "*x" is
    the type of the embeddings), except those in COMMON. constants: returns the constexpr arguments for a tile, a
    width D and whether the embeddings have 16 bits. scalars: maps the other arguments to their types ("i32",
    divisible by 16, or "fp32"). unaligned: pointers that may not be divisible by 16. dots: whether 16-bit variants
    must use tensor cores. widths: the values of D to compile for. dtypes: the types to use for "*x". row: the name
    of another kernel whose tile this kernel uses, because it has to repeat that kernel's sums. options: returns
    launch options, such as "num_warps", that differ from the tile's.
    """

    name: str
    kernel: object
    pointers: Mapping[str, str]
    constants: Callable[[Tile, int, bool], dict[str, object]]
    scalars: Mapping[str, str] = field(default_factory=dict)
    unaligned: frozenset[str] = frozenset()
    dots: bool = True
    widths: tuple[int, ...] = (64, 512, 1152)
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    row: str = ""
    options: Callable[[Tile, int, bool], dict[str, int]] | None = None

    @property
    def types(self) -> dict[str, str]:
        """Maps the pointers and scalars to their types."""
        common = {name: kind for name, kind in COMMON.items() if name in self.kernel.arg_names}
        return {**common, **self.pointers, **self.scalars}

    @property
    def tile_name(self) -> str:
        """The name under which the tile table has this kernel's tile."""
        return self.row or self.name

    def launch_options(self, tile: Tile, width: int, half: bool) -> dict[str, int]:
        """Returns the options for launching the kernel."""
        own = self.options(tile, width, half) if self.options else {}
        return {"num_warps": tile.warps, "num_stages": tile.stages, **own}

    def build_key(self, tile: Tile, width: int, half: bool) -> tuple[object, ...]:
        """Returns a key that is equal for tiles from which the compiler builds the same code."""
        constants, options = self.constants(tile, width, half), self.launch_options(tile, width, half)
        return self.name, *constants.items(), *options.items()
