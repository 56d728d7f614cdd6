"""What the losses exchange: the two sides of a batch, and the winners of the hinge. Sizes: see `d2s.kernels`."""

from typing import NamedTuple

from torch import Tensor


class Sides(NamedTuple):
    """The arguments that all contrastive losses share. Row i's positive is column offset + i."""

    image: Tensor  # (B, D), rows of the similarity matrix
    text: Tensor  # (N, D), its columns
    image_ids: Tensor  # (B,) int64
    text_ids: Tensor  # (N,) int64; a pair of equal ids is never a negative
    offset: int = 0
    both: bool = True  # rows and columns, with B = N and offset 0; else rows alone

    def contiguous(self) -> "Sides":
        """The same with contiguous tensors."""
        return self._replace(**{name: getattr(self, name).contiguous() for name in self._fields[:4]})


class Winners(NamedTuple):
    """Each row's and each column's hardest negative; without `Sides.both` those of the columns are empty."""

    row_at: Tensor  # (B,) int64, its column
    row_active: Tensor  # (B,) bool, whether it violates the margin
    column_at: Tensor  # (N,) int64, its row
    column_active: Tensor  # (N,) bool
