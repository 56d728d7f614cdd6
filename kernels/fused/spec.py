"""What ahead-of-time compilation and the tuner need to know about a Triton kernel."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from d2s.kernels.fused.tiles import Tile

# The pointers that have the same type in all kernels.
COMMON = {"image": "*x", "text": "*x", "ds": "*x", "image_ids": "*i64", "text_ids": "*i64"}


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One kernel, as `d2s.kernels.compile` builds it without a device.

    name: the kernel's name, also in the tile table. kernel: the `@triton.jit` function; arguments that it does not
    specialize are "i32". pointers: argument name to Triton type ("*fp32", "*i64", "*i1"; "*x" stands for the
    embeddings' type), without those in COMMON. constants: the constexpr arguments, given a tile, a width D and
    whether the embeddings have 16 bits. scalars: the other arguments' types ("i32", divisible by 16, or "fp32").
    unaligned: pointers that may not be divisible by 16. dots: whether 16-bit variants have to use tensor cores.
    widths: the D to compile for. dtypes: the types that "*x" stands for. row: the name of another kernel whose tile
    this one uses, because it has to repeat that kernel's sums. options: launch options, such as "num_warps", that
    differ from the tile's.
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
        """The types of the pointers and scalars."""
        common = {name: kind for name, kind in COMMON.items() if name in self.kernel.arg_names}
        return {**common, **self.pointers, **self.scalars}

    @property
    def tile_name(self) -> str:
        """The kernel's name in the tile table."""
        return self.row or self.name

    def launch_options(self, tile: Tile, width: int, half: bool) -> dict[str, int]:
        """The options that the kernel is launched with."""
        own = self.options(tile, width, half) if self.options else {}
        return {"num_warps": tile.warps, "num_stages": tile.stages, **own}

    def build_key(self, tile: Tile, width: int, half: bool) -> tuple[object, ...]:
        """Equal for tiles from which the compiler builds the same code."""
        constants, options = self.constants(tile, width, half), self.launch_options(tile, width, half)
        return self.name, *constants.items(), *options.items()
