"""The tuples that losses pass on: the sides of a batch, and hardest negatives. Sizes: see `d2s.kernels`."""

from typing import NamedTuple

from torch import Tensor


class Sides(NamedTuple):
    """The arguments that all contrastive losses share. The positive of row i is column offset + i."""

    image: Tensor  # (B, D), rows of the similarity matrix
    text: Tensor  # (N, D), columns of the similarity matrix
    image_ids: Tensor  # (B,) int64
    text_ids: Tensor  # (N,) int64; a pair of equal ids is never a negative
    offset: int = 0
    both: bool = True  # True: rows and columns count, with B = N and offset 0. False: rows alone count

    def contiguous(self) -> "Sides":
        """Returns the same sides with contiguous tensors."""
        return self._replace(**{name: getattr(self, name).contiguous() for name in self._fields[:4]})


class Winners(NamedTuple):
    """The hardest negative of each row and column. If `Sides.both` is false, the columns have none."""

    row_at: Tensor  # (B,) int64: the column of each row's hardest negative
    row_active: Tensor  # (B,) bool: whether this negative violates the margin
    column_at: Tensor  # (N,) int64: the row of each column's hardest negative
    column_active: Tensor  # (N,) bool: whether this negative violates the margin
