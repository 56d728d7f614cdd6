"""Describes a Triton kernel for ahead-of-time compilation and for the tuner."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from d2s.kernels.fused.tiles import Tile

# The types of pointers that have the same type in all kernels.
COMMON = {"image": "*x", "text": "*x", "ds": "*x", "image_ids": "*i64", "text_ids": "*i64"}


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """Describes a kernel. `d2s.kernels.compile` builds the kernel from it without a device.

    name: the kernel's name, also in the tile table. kernel: the `@triton.jit` function. Its arguments in
    do_not_specialize have the type "i32". pointers: maps an argument to its Triton type, such as "*fp32" or
    "*i64". "*x" is the type of the embeddings. COMMON has more pointers. constants: returns the constexpr
    arguments for a tile, a width D and `half` (whether embeddings have 16 bits). scalars: maps the other
    arguments to "i32" (values divisible by 16) or "fp32". unaligned: pointers whose address may not be
    divisible by 16. dots: whether 16-bit variants must use tensor cores. widths, dtypes: the values of D and
    the types of "*x" to compile for. row: the name of another kernel whose tile this kernel must use, to add
    in the same order. options: returns launch options, such as "num_warps", that differ from the tile's.
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
        """Maps the names of pointers and scalars to their Triton types."""
        common = {name: kind for name, kind in COMMON.items() if name in self.kernel.arg_names}
        return {**common, **self.pointers, **self.scalars}

    @property
    def tile_name(self) -> str:
        """Names the kernel whose tile in `tiles.json` this kernel uses."""
        return self.row or self.name

    def launch_options(self, tile: Tile, width: int, half: bool) -> dict[str, int]:
        """Returns the launch options for a tile and a width D. `half`: the embeddings have 16 bits."""
        own = self.options(tile, width, half) if self.options else {}
        return {"num_warps": tile.warps, "num_stages": tile.stages, **own}

    def build_key(self, tile: Tile, width: int, half: bool) -> tuple[object, ...]:
        """Returns a key. If two tiles have equal keys, the compiler builds the same code for both."""
        constants, options = self.constants(tile, width, half), self.launch_options(tile, width, half)
        return self.name, *constants.items(), *options.items()
