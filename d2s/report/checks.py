"""Whether rows of metrics.jsonl and files of `d2s.evaluate --json` hold what the report computes with."""

import math
from typing import Any

_SINGLE = ("loss", "lr", "samples_per_s", "grad_norm", "distill", "rsum")
_FINITE = ("step", "epoch", "seconds")
_PAIRS = ("median_rank", "mean_rank", "queries")
_WAYS = ("i2t", "t2i")


def check_numbers(values: dict[str, Any], where: str) -> None:
    """Raises ValueError, in one line that begins with `where`, on the first value of a wrong type.

    Checked is what is there; what is missing is left out of the report.
    """
    for name in (*_SINGLE, *_FINITE):
        if name in values and not _is_number(values[name], finite=name in _FINITE):
            _refuse(where, name, values[name], "a finite number" if name in _FINITE else "a number")
    check_scores(values, where)
    for name in ("dense", "folds"):
        part = values.get(name)
        if part is not None and not isinstance(part, dict):
            _refuse(where, name, part, "an object with the numbers of an evaluation")
        if part:
            check_scores(part, f"{where}: in {name}")
    if values.get("folds") and not _is_number(values["folds"].get("number"), finite=True):
        _refuse(where, "folds.number", values["folds"].get("number"), "a number")


def check_scores(values: dict[str, Any], where: str) -> None:
    """The same for what `Retrieval.to_dict` gives."""
    if ("i2t" in values) != ("t2i" in values):
        missing = "t2i" if "i2t" in values else "i2t"
        raise ValueError(f"{where}: has one direction of recall but no {missing}: mend or remove it")
    for way in _WAYS:
        if way in values and not _are_three(values[way]):
            _refuse(where, way, values[way], "a list of three numbers")
    if "rsum" in values and not _is_number(values["rsum"]):
        _refuse(where, "rsum", values["rsum"], "a number")
    for name in (*_PAIRS, "chance"):
        part = values.get(name, {})
        if not isinstance(part, dict):
            _refuse(where, name, part, "an object with i2t and t2i")
        for way in _WAYS:
            if way in part and name == "chance" and not _are_three(part[way]):
                _refuse(where, f"{name}.{way}", part[way], "a list of three numbers")
            if way in part and name != "chance" and not _is_number(part[way], finite=name == "queries"):
                _refuse(where, f"{name}.{way}", part[way], "a number")


def _is_number(value: object, finite: bool = False) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (not finite or math.isfinite(value))
    )


def _are_three(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


def _refuse(where: str, name: str, value: object, wanted: str) -> None:
    raise ValueError(f"{where}: {name} is {repr(value)[:60]}: it must be {wanted}")
