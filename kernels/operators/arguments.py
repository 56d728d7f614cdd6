"""Checks the arguments of the public functions.

Each check raises ValueError with one line that names the argument, its value and the remedy. `torch.compile`
traces these checks into the graph. Only `check_lists` waits for the device.
"""

import math
import operator
from numbers import Real

import torch
from torch import Tensor

from d2s.kernels.dtypes import accumulator
from d2s.kernels.sides import Sides

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The largest number of each type. These are constants, because torch.compile cannot trace torch.finfo.
LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _show(x: object) -> str:
    """Returns the text of a plain value, the type and shape of a tensor, or else the name of the class."""
    if isinstance(x, Tensor):
        return f"{_name(x.dtype)} {tuple(x.shape)}"
    return repr(x) if x is None or isinstance(x, bool | int | float | str) else f"a {type(x).__name__}"


def check_tensor(
    name: str,
    x: Tensor,
    shape: tuple[int | str, ...],
    like: Tensor | None = None,
    types: tuple[torch.dtype, ...] = FLOATS,
    empty: bool = False,
) -> None:
    """Raises ValueError unless `x` is a dense tensor of `shape`, of one of `types`, on the device of `like`.

    In `shape`, a letter stands for any size. If `empty` is false, this size must not be 0. If `like` is None, the
    device is not checked. name: the argument's name, for the message.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: {_show(x)} is not a tensor; convert it with torch.as_tensor")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: the layout is {_name(x.layout)}; make it dense with .to_dense()")
    if x.dtype not in types:
        wanted = " or ".join(map(_name, types))
        raise ValueError(f"{name}: {_show(x)} should be of type {wanted}; convert it with .to()")
    sizes = list(zip(x.shape, shape, strict=False))
    if x.dim() != len(shape) or any(size != b for size, b in sizes if not isinstance(b, str)):
        wanted = str(shape).replace("'", "")
        raise ValueError(f"{name}: the shape is {tuple(x.shape)} and should be {wanted}")
    if not empty and any(size == 0 for size, b in sizes if isinstance(b, str)):
        raise ValueError(f"{name}: {_show(x)} is empty; give at least one row and one column")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: lies on {x.device}; move it to {like.device}")


def check_flag(name: str, value: bool) -> None:
    """Raises ValueError unless `value` is True or False. name: the argument's name, for the message."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {_show(value)} is not a truth value; give True or False")


def check_number(name: str, value: float, like: Tensor) -> float:
    """Returns `value` as an int or float. Raises ValueError unless the accumulator type of `like` can hold it."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        if isinstance(value, bool | Tensor) or not isinstance(value, Real):
            remedy = "take its number with .item()" if isinstance(value, Tensor) else "give a float"
            raise ValueError(f"{name}: {_show(value)} is not a number; {remedy}")
        value = float(value)
    largest = LARGEST[accumulator(like.dtype)]
    # Comparisons, because torch.compile cannot trace math.isfinite of a number that changes between calls.
    if not -largest <= value <= largest:
        problem = "too large to compute with" if math.isfinite(value) else "not a finite number"
        raise ValueError(f"{name}: {value} is {problem}; stay between -{largest:.1e} and {largest:.1e}")
    return value


def number_tensor(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """Returns a number or a float tensor of one entry as a tensor. Raises ValueError for other values.

    like: its device is used, and a number gets its accumulator type. name: the argument's name, for the message.
    """
    if not isinstance(value, Tensor):
        number = check_number(name, value, like)
        return torch.full((1,), number, dtype=accumulator(like.dtype), device=like.device)
    check_tensor(name, value, tuple(value.shape), like)
    if value.numel() != 1:
        raise ValueError(f"{name}: {_show(value)} has not one entry; give one, or a float")
    return value


def check_sides(
    image: Tensor, text: Tensor, image_ids: Tensor, text_ids: Tensor | None, offset: int, both: bool
) -> Sides:
    """Returns the arguments of a contrastive loss as `Sides`. Raises ValueError if an argument is wrong."""
    check_tensor("image", image, ("B", "D"))
    check_tensor("text", text, ("N", image.shape[1]), image, (image.dtype,))
    b, n = image.shape[0], text.shape[0]
    check_tensor("image_ids", image_ids, (b,), image, (torch.int64,))
    if text_ids is None:
        if b != n:
            raise ValueError(f"text_ids: missing; {b} image rows and {n} text rows cannot share image_ids")
        text_ids = image_ids
    check_tensor("text_ids", text_ids, (n,), image, (torch.int64,))
    check_flag("both", both)
    if not isinstance(offset, int) or isinstance(offset, bool):
        if isinstance(offset, bool | Tensor) or not hasattr(offset, "__index__"):
            raise ValueError(f"offset: {_show(offset)} is not a whole number; give an int")
        offset = operator.index(offset)
    if both and (b != n or offset != 0):
        raise ValueError(
            f"both: needs as many rows as columns and offset 0, not {b}, {n}, {offset}; set False"
        )
    if not 0 <= offset <= n - b:
        remedy = f"give 0 to {n - b}" if b <= n else "give the columns of all workers as text"
        raise ValueError(f"offset: {offset} + {b} rows do not fit into the {n} columns; {remedy}")
    return Sides(image, text, image_ids, text_ids, offset, both)


def check_positives(
    queries: Tensor,
    candidates: Tensor,
    positives: tuple[Tensor, Tensor] | None,
    query_ids: Tensor | None,
    candidate_ids: Tensor | None,
) -> None:
    """Raises ValueError unless positives are given in one of the two forms of `functional.retrieval_ranks`."""
    b, n = queries.shape[0], candidates.shape[0]
    if positives is None:
        if query_ids is None or candidate_ids is None:
            raise ValueError("positives: missing; give (starts, indices), or query_ids and candidate_ids")
        check_tensor("query_ids", query_ids, (b,), queries, (torch.int64,))
        check_tensor("candidate_ids", candidate_ids, (n,), queries, (torch.int64,))
        return
    if query_ids is not None or candidate_ids is not None:
        raise ValueError("positives: given beside query_ids or candidate_ids; give one of the two forms")
    if not isinstance(positives, tuple | list) or len(positives) != 2:
        raise ValueError(f"positives: {_show(positives)} is not a pair; give (starts, indices)")
    starts, indices = positives
    check_tensor("positives[0]", starts, (b + 1,), queries, (torch.int64,))
    count = indices.numel() if isinstance(indices, Tensor) else 0
    check_tensor("positives[1]", indices, (count,), queries, (torch.int64,))
    if not torch.compiler.is_compiling() and starts.device.type != "meta":
        check_lists(starts, indices, n)


def check_lists(starts: Tensor, indices: Tensor, n: int) -> None:
    """Raises ValueError unless `starts` rises from 0 to the number of indices, and indices are in 0..n-1."""
    falls = starts[1:] < starts[:-1]
    ends = indices.aminmax() if indices.numel() else (starts[0], starts[0])
    found = torch.stack([starts[0], starts[-1], falls.any().to(starts.dtype), *ends])
    first, last, falling, lowest, highest = found.tolist()
    if (count := indices.numel()) != last or first != 0 or falling:
        where = f", falling at {int(falls.nonzero()[0])}" if falling else ""
        raise ValueError(
            f"positives[0]: goes from {first} to {last}{where}; starts rise from 0 to the number of indices, {count}"
        )
    if count and not 0 <= lowest <= highest < n:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"positives[1]: {wrong} is none of the {n} candidates; give indices from 0 to {n - 1}"
        )
