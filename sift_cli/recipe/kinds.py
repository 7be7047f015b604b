"""Kinds of values that a recipe holds, each with its error and its JSON schema."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    WrapValidator,
)
from pydantic_core import CoreSchema, core_schema

from sift_cli.errors import nearest

PositiveInt = Annotated[int, Field(gt=0, strict=True)]
Share = Annotated[float, Field(gt=0, le=1)]


def checked(kind: Any, value: object) -> Any:
    """The value as that kind; a ValueError says what is wrong as pydantic does of one type."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{first['loc'][0]}: " if first["loc"] else ""
        message = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        raise ValueError(f"{where}{message}, got {first['input']!r}") from None


def as_list(value: object) -> object:
    """A text alone becomes a list of one."""
    return [value] if isinstance(value, str) else value


class _OneOf(NamedTuple):
    """Accepts the names in `known`; the error offers the nearest, the JSON schema lists them."""

    known: tuple[str, ...]

    def check(self, value: str) -> str:
        if value not in self.known:
            raise ValueError(f"unknown: {value!r}{nearest(value, self.known)}")
        return value

    def __get_pydantic_core_schema__(self, kind: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(kind))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self.known)}


def one_of(known: Iterable[str]) -> _OneOf:
    """The kind of a name that must be among `known`."""
    return _OneOf(tuple(known))


def in_short(expected: str) -> WrapValidator:
    """Gives a value of several types one error message, in place of one for each type."""

    def check(value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise ValueError(f"give {expected}, got {value!r}") from None

    return WrapValidator(check)


def or_list(item: dict[str, Any]) -> WithJsonSchema:
    """The JSON schema of an item, or a list of them."""
    return WithJsonSchema({"anyOf": [item, {"type": "array", "items": item}]})


Names = Annotated[list[str], BeforeValidator(as_list), or_list({"type": "string"})]


class Section(BaseModel):
    """Part of a recipe; a key that it does not know is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )
