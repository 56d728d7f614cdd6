"""What ahead-of-time compilation needs to know of a Triton kernel: its arguments, its constants, its tiles."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from d2s.kernels.fused.tiles import Tile


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One kernel as `d2s.kernels.compile` builds it without a device.

    name: its row in the tile table, too. kernel: the `@triton.jit` function. pointers: argument name to Triton
    type ("*fp32", "*i64", "*i1"; "*x" stands for the type of the embeddings). scalars: argument name to type
    ("i32", "fp32"). constants: the constexpr arguments for a tile, a width D and whether the embeddings are in
    16 bits. unaligned: pointers and scalars that must not be taken to be divisible by 16. dots: whether
    16-bit variants are expected to use tensor cores. widths: the D to compile for. dtypes: the types "*x" takes.
    row: the row of the tile table, where it is another kernel's whose sums this one must repeat. options: the
    launch options ("num_warps") that do not follow from the tile alone.
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
