"""What the public functions refuse: ValueError in one line that names the argument, what it is, and the remedy.

`torch.compile` traces all of it into one graph, and nothing waits for the device but `check_lists`. Where an argument
is right, each check is a few comparisons; what a message needs is worked out once it is wrong.
"""

import math
import operator
from numbers import Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The largest numbers of the types that are computed in.
_LARGEST = {torch.float64: torch.finfo(torch.float64).max}
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(x: Tensor) -> str:
    return f"{_plain(x.dtype)} {tuple(x.shape)}"


def _shown(x: object) -> str:
    """x in a few words and one line."""
    if isinstance(x, Tensor):
        return f"a tensor, {_describe(x)},"
    if x is None or isinstance(x, bool | int | float | str):
        try:
            text = repr(x)
        except ValueError:
            return "an int of thousands of digits"
        return text if len(text) <= 40 else f"{text[:36]}..."
    return f"of type {type(x).__module__}.{type(x).__qualname__}".replace("builtins.", "")


def check_tensor(name: str, x: Tensor) -> None:
    """x is a tensor, and dense."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: {_shown(x)} is not a tensor; give one, as torch.as_tensor makes it")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: the layout is {_plain(x.layout)}; make it dense with .to_dense()")


def check_floats(name: str, x: Tensor, dims: int, form: str) -> None:
    """x is a dense tensor of a float type that is computed with, of so many dimensions, which form names."""
    check_tensor(name, x)
    if x.dtype not in FLOATS:
        wanted = ", ".join(map(_plain, FLOATS))
        raise ValueError(f"{name}: {_describe(x)} is of no float type in use; convert it to one of {wanted}")
    if x.dim() != dims:
        raise ValueError(f"{name}: {_describe(x)} has {x.dim()} dimensions; give {form}")


def check_matrix(name: str, x: Tensor) -> None:
    """x is a float matrix that is not empty."""
    check_floats(name, x, 2, "a matrix of rows")
    if 0 in x.shape:
        raise ValueError(f"{name}: {_describe(x)} is empty; give at least one row and one column")


def check_like(
    name: str, x: Tensor, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> None:
    """x has the shape, lies where `like` does, and is of the type (any float type in use where none is given)."""
    check_tensor(name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: the shape is {tuple(x.shape)} and should be {shape}")
    if x.dtype != dtype if dtype is not None else x.dtype not in FLOATS:
        wanted = " or ".join(map(_plain, FLOATS)) if dtype is None else _plain(dtype)
        raise ValueError(
            f"{name}: the type is {_plain(x.dtype)} and should be {wanted}; convert it with .to()"
        )
    if x.device != like.device:
        raise ValueError(f"{name}: lies on {x.device}; move it to {like.device}")


def check_flag(name: str, value: bool) -> None:
    """value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {_shown(value)} is no truth value; give True or False")


def check_int(name: str, value: int) -> int:
    """value as an int, which numpy's whole numbers become, too."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, bool | Tensor) or not hasattr(value, "__index__"):
        raise ValueError(f"{name}: {_shown(value)} is not a whole number; give an int")
    return operator.index(value)


def check_number(name: str, value: float, like: Tensor) -> float:
    """value as a number that the type in which `like` is computed with can hold; numpy's become Python's."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        if isinstance(value, bool | Tensor) or not isinstance(value, Real):
            remedy = "take its number with .item()" if isinstance(value, Tensor) else "give a float"
            raise ValueError(f"{name}: {_shown(value)} is not a number; {remedy}")
        value = float(value)
    # Comparisons, which the compiler can trace for a number that varies; math.isfinite it cannot.
    largest = _LARGEST.get(like.dtype, _LARGEST_FLOAT32)
    if not -largest <= value <= largest:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: {value} is not a finite number; give one")
        raise ValueError(
            f"{name}: {_shown(value)} is too large to compute with; stay between -{largest:.1e} and {largest:.1e}"
        )
    return value


def number_tensor(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """A number or a tensor of one entry as a float tensor on the device of `like`."""
    if isinstance(value, Tensor):
        check_tensor(name, value)
        if value.numel() != 1 or value.dtype not in FLOATS:
            raise ValueError(
                f"{name}: {_describe(value)} is not a float tensor of one entry; give that or a float"
            )
        if value.device != like.device:
            raise ValueError(f"{name}: lies on {value.device}; move it to {like.device}")
        return value
    value = check_number(name, value, like)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((1,), value, dtype=dtype, device=like.device)


def check_sides(
    image: Tensor, text: Tensor, image_ids: Tensor, text_ids: Tensor | None, offset: int, both: bool
) -> tuple[Tensor, int]:
    """Checks the two sides of a contrastive loss; gives (text_ids, offset)."""
    check_matrix("image", image)
    check_matrix("text", text)
    n, m = image.shape[0], text.shape[0]
    check_like("text", text, image, (m, image.shape[1]), image.dtype)
    check_like("image_ids", image_ids, image, (n,), torch.int64)
    if text_ids is None:
        if n != m:
            raise ValueError(f"text_ids: missing; {n} image rows and {m} text rows cannot share image_ids")
        text_ids = image_ids
    check_like("text_ids", text_ids, image, (m,), torch.int64)
    check_flag("both", both)
    offset = check_int("offset", offset)
    if both and (n != m or offset != 0):
        raise ValueError(
            f"both: needs as many rows as columns and offset 0, not {n}, {m}, {_shown(offset)}; set False"
        )
    if not 0 <= offset <= m - n:
        remedy = f"give 0 to {m - n}" if n <= m else "give everybody's columns as text"
        raise ValueError(f"offset: {_shown(offset)} + {n} rows do not lie in the {m} columns; {remedy}")
    return text_ids, offset


def check_positives(
    queries: Tensor,
    candidates: Tensor,
    positives: tuple[Tensor, Tensor] | None,
    query_ids: Tensor | None,
    candidate_ids: Tensor | None,
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Checks both forms in which positives may be given; gives (starts, indices), or (None, None) for ids."""
    n, m = queries.shape[0], candidates.shape[0]
    if positives is None:
        if query_ids is None or candidate_ids is None:
            raise ValueError("positives: missing; give (starts, indices), or query_ids and candidate_ids")
        check_like("query_ids", query_ids, queries, (n,), torch.int64)
        check_like("candidate_ids", candidate_ids, queries, (m,), torch.int64)
        return None, None
    if query_ids is not None or candidate_ids is not None:
        raise ValueError("positives: given beside query_ids or candidate_ids; give one of the two forms")
    if not isinstance(positives, tuple | list) or len(positives) != 2:
        what = f"{len(positives)} things" if isinstance(positives, tuple | list) else _shown(positives)
        raise ValueError(f"positives: {what} where a pair is due; give (starts, indices)")
    starts, indices = positives
    check_like("positives[0]", starts, queries, (n + 1,), torch.int64)
    check_tensor("positives[1]", indices)
    check_like("positives[1]", indices, queries, (indices.numel(),), torch.int64)
    if not torch.compiler.is_compiling() and starts.device.type != "meta":
        check_lists(starts, indices, m)
    return starts, indices


def check_lists(starts: Tensor, indices: Tensor, m: int) -> None:
    """starts (n + 1,) rise from 0 to the number of indices, which lie in 0..m-1. Waits for the device, once."""
    falls = starts[1:] < starts[:-1]
    ends = indices.aminmax() if indices.numel() else (starts[0], starts[0])
    found = torch.stack([starts[0], starts[-1], falls.any().to(starts.dtype), *ends])
    first, last, falling, lowest, highest = found.tolist()
    if first != 0:
        raise ValueError(f"positives[0]: begins with {first}; the first start is 0")
    if falling:
        i = int(falls.nonzero()[0])
        a, b = starts[i : i + 2].tolist()
        raise ValueError(f"positives[0]: falls from {a} at {i} to {b}; order the lists by their query")
    if last != indices.numel():
        raise ValueError(
            f"positives[0]: ends with {last}; the last start is the number of indices, {indices.numel()}"
        )
    if indices.numel() and not 0 <= lowest <= highest < m:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"positives[1]: {wrong} is none of the {m} candidates; give indices from 0 to {m - 1}"
        )
