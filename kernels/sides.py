"""Named tuples for the two sides of a batch and for hardest negatives. `d2s.kernels` explains the sizes."""

from typing import NamedTuple

from torch import Tensor


class Sides(NamedTuple):
    """Holds the arguments that all contrastive losses share. The positive of row i is column offset + i."""

    image: Tensor  # (B, D), rows of the similarity matrix
    text: Tensor  # (N, D), columns of the similarity matrix
    image_ids: Tensor  # (B,) int64
    text_ids: Tensor  # (N,) int64; a pair of equal ids is never a negative
    offset: int = 0
    both: bool = True  # True: the loss sums over rows and columns (B = N, offset 0). False: over rows only

    def contiguous(self) -> "Sides":
        """Returns a copy in which all four tensors are contiguous."""
        return self._replace(**{name: getattr(self, name).contiguous() for name in self._fields[:4]})


class Winners(NamedTuple):
    """Holds the hardest negative per row and column. Column fields are empty if `Sides.both` is false."""

    row_at: Tensor  # (B,) int64: the column of each row's hardest negative
    row_active: Tensor  # (B,) bool: whether similarity + margin exceeds the positive's similarity
    column_at: Tensor  # (N,) int64: the row of each column's hardest negative
    column_active: Tensor  # (N,) bool: like row_active, for columns
