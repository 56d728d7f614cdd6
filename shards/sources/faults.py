"""Checks fields and captions of the input, and collects their faults."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from d2s.common.messages import shorten


@dataclass
class Faults:
    """Collects faults of the input in `rows`. Without `quarantine`, the first fault raises ValueError."""

    quarantine: bool = False
    rows: list[dict[str, str]] = field(default_factory=list)

    def add(self, where: str, reason: str, key: str = "") -> None:
        """Records a fault, or raises it as ValueError. Each argument is shortened to 300 characters."""
        # Names in a source may hold line breaks and unpaired surrogates, which a terminal cannot print.
        where, reason, key = (_one_line(text) for text in (where, reason, key))
        if not self.quarantine:
            raise ValueError(f"{where}: {reason}")
        self.rows.append({"where": where, "key": key, "reason": reason})

    def summary(self) -> str:
        """Returns a line with the number of faults and the first two."""
        first = "; ".join(
            f"{shorten(row['where'], 80)}: {shorten(row['reason'], 200)}" for row in self.rows[:2]
        )
        count = f"{len(self.rows):,} faults, the first" if len(self.rows) > 2 else "left out"
        return f"{count}: {first}"


def _one_line(text: str) -> str:
    text = shorten(text).encode("utf-8", "backslashreplace").decode()
    return shorten(text.replace("\r", "\\r").replace("\n", "\\n"))


def caption_fault(captions: tuple) -> str | None:
    """Returns why the captions cannot be stored, or None if each is a non-empty string of valid Unicode."""
    for number, caption in enumerate(captions):
        if not isinstance(caption, str):
            return f"caption {number} is {type(caption).__name__}, not text: {shorten(repr(caption), 80)}"
        if not caption.strip():
            return f"caption {number} is empty"
        try:
            caption.encode("utf-8")
        except UnicodeEncodeError:
            return f"caption {number} is not valid Unicode"
    return None


def no_column(name: str, there: Iterable[str], option: str, what: str = "column") -> str:
    """The reason of a fault: a column is missing that `option` of the command may name."""
    names = shorten(", ".join(there)) or "none, the file is empty"
    return f"no {what} {name!r}; there are {names}: {option} NAME"


def is_integer(value: object) -> bool:
    """Returns whether `value` is an int but not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole_number(value: object) -> object:
    """Converts 7.0 or "7" to an int, and NaN to None. (pandas turns ids into floats.)

    Returns any other value unchanged. This includes strings with a leading zero, because they are names.
    """
    if isinstance(value, float):
        return None if value != value else int(value) if value.is_integer() else value
    if isinstance(value, str) and (match := re.fullmatch(r"(0|-?[1-9][0-9]{0,18})(\.0+)?", value)):
        return int(match[1])
    return value


def text_field(row: dict, name: str) -> str:
    """Returns field `name`. Raises KeyError if it is missing, TypeError if it is not a non-empty string."""
    value = row[name]
    if not isinstance(value, str) or not value:
        raise TypeError(f"field {name!r} is {shorten(repr(value))}, not text")
    if caption_fault((value,)):
        raise TypeError(f"field {name!r} is {shorten(repr(value))}, not valid text")
    return value


def integer_field(row: dict, name: str) -> int:
    """Returns field `name`. Raises KeyError if it is missing, TypeError if it is not an integer."""
    value = row[name]
    if not is_integer(value):
        raise TypeError(f"field {name!r} is {shorten(repr(value))}, not a whole number")
    return value


def field_fault(error: KeyError | TypeError) -> str:
    """Turns an error of `text_field` or `integer_field` into the text of a fault."""
    return f"no field {error}" if isinstance(error, KeyError) else str(error)
