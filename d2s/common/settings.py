"""Settings: frozen dataclasses that pydantic checks, with one line for each mistake.

    @settings("optim")
    class OptimConfig(Settings):
        lr: NonNegativeFloat = 2e-4

A value must already have its field's type: `True` is no integer and `"8"` neither. Numbers must be finite.
pydantic is imported by the functions, so that machines without it can import this room.
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
    """Conversion to JSON and back, for the classes that :func:`settings` decorates."""

    name_on_command_line: ClassVar[str] = ""
    """What stands before a field's name where a user types it, as in --optim.lr."""

    def to_dict(self) -> dict[str, Any]:
        """The settings as a dictionary of plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The settings that `to_dict` gave. Raises ValueError for an unknown field or a value that does not fit."""
        from pydantic import TypeAdapter, ValidationError

        try:
            # As JSON, where a list stands for a tuple and a dictionary for the settings of a part.
            return TypeAdapter(cls).validate_json(json.dumps(values))
        except ValidationError as error:
            raise ValueError(_one_line(error, cls.name_on_command_line or cls.__name__)) from None


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(name: str = "") -> Callable[[type[T]], type[T]]:
    """Makes a class a frozen, keyword-only dataclass whose constructor checks every value.

    name: what a user types before its fields. The constructor raises ValueError in one line.
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
    """`; did you mean 'NEAREST'?`, or nothing where no name is near."""
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _one_line(error: "ValidationError", prefix: str) -> str:
    """The first mistake that pydantic found: dotted field name, value and remedy."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":  # raised by a class's own check, which names its fields
        return str(first["ctx"]["error"])
    path = [part for part in first["loc"] if isinstance(part, str)]  # without the position in a tuple
    remedy = first["msg"].replace("Input should be", "it must be")
    if first["type"] == "unexpected_keyword_argument":
        names = {field.name for kind in Settings.__subclasses__() for field in dataclasses.fields(kind)}
        remedy = f"there is no such field{did_you_mean(path[-1], names)}"
    elif first["type"] == "missing":
        remedy = "it has too few values"
    value = repr(first["input"])
    return f"{'.'.join([*filter(None, [prefix]), *path])} is {value[:60]}: {remedy}"
