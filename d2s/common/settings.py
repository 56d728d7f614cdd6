"""Defines settings: frozen dataclasses, checked by pydantic. Mistakes raise ValueError with a one-line text.

    @settings("optim")
    class OptimConfig(Settings):
        lr: NonNegativeFloat = 2e-4

Values are not converted to their field's type: `True` and `"8"` are no integers. Numbers must be finite.
Only functions import pydantic, so machines without it can import `d2s.common`.
"""

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, dataclass_transform

if TYPE_CHECKING:
    from pydantic import ValidationError

T = TypeVar("T", bound="Settings")


class Settings:
    """Base class of all classes that :func:`settings` decorates. Converts settings to JSON types and back."""

    name_on_command_line: ClassVar[str] = ""
    """Prefix of the fields' names on the command line, as `optim` in --optim.lr."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as a dictionary of plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds settings from the result of `to_dict`. Raises ValueError if a field is invalid."""
        from pydantic import TypeAdapter, ValidationError

        try:
            # For JSON, pydantic accepts lists for tuples, and dictionaries for nested settings.
            return TypeAdapter(cls).validate_json(json.dumps(values))
        except ValidationError as error:
            raise ValueError(_one_line(error, cls.name_on_command_line or cls.__name__)) from None


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(name: str = "") -> Callable[[type[T]], type[T]]:
    """Makes a class a frozen, keyword-only dataclass whose constructor checks every value.

    name: prefix of the fields' names on the command line. The constructor raises ValueError for a bad value.
    """
    from pydantic import ConfigDict, ValidationError
    from pydantic.dataclasses import dataclass

    def decorate(cls: type[T]) -> type[T]:
        cls.name_on_command_line = name
        config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
        cls = dataclass(cls, frozen=True, kw_only=True, config=config)
        construct = cls.__init__

        def checked(self: T, **values: Any) -> None:
            try:
                construct(self, **values)
            except ValidationError as error:
                raise ValueError(_one_line(error, name)) from None

        cls.__init__ = checked  # type: ignore[method-assign]
        return cls

    return decorate


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns `; did you mean 'NEAREST'?` with the most similar of `names`, or "" if none is similar."""
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _one_line(error: "ValidationError", prefix: str) -> str:
    """Returns a line about the first mistake that pydantic found: dotted field name, value and remedy."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":  # raised by a check in the class; its message names the fields
        return str(first["ctx"]["error"])
    path = [part for part in first["loc"] if isinstance(part, str)]  # leaves out positions in a tuple
    remedy = first["msg"].replace("Input should be", "it must be")
    if first["type"] == "unexpected_keyword_argument":
        names = {field.name for kind in Settings.__subclasses__() for field in dataclasses.fields(kind)}
        remedy = f"there is no such field{did_you_mean(path[-1], names)}"
    elif first["type"] == "missing":
        remedy = "it has too few values"
    value = repr(first["input"])
    return f"{'.'.join([*filter(None, [prefix]), *path])} is {value[:60]}: {remedy}"
