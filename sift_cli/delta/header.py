"""What a delta file's header may say: read before anything that it describes."""

import re
from collections.abc import Callable
from math import prod
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SkipValidation,
    StringConstraints,
    WrapValidator,
    model_validator,
)

from sift_cli.delta.coding import LARGEST_SIZE

PARAMETER_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")  # of a parameter: words with dots between

Dtype = Literal["float64", "float32", "float16", "bfloat16"]

Count = Annotated[int, Field(ge=0, lt=LARGEST_SIZE)]
Fingerprint = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]


def _as_given(value: object, check: Callable[[object], object]) -> object:
    check(value)
    return value


Number = Annotated[float, WrapValidator(_as_given)]  # 1 stays 1: what is read is saved as it was


class _Stated(BaseModel):
    """Keys of the header; unknown ones are kept, so that what is read and saved loses nothing."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    def to_json(self) -> dict[str, Any]:
        """The keys that were given, also those whose value is None, and no default of another."""
        return {
            key: value.to_json() if isinstance(value, _Stated) else value
            for key, value in self
            if key in self.model_fields_set
        }


class Base(_Stated):
    """The model that the delta changes, as training held it.

    `kept_dtypes` has the parameters that are not of `dtype`, `tied` the further names of tied
    parameters, each with the first name of its tensor, `vocabulary` the rows of the embedding.
    """

    path: str
    dtype: Dtype
    revision: str | None = None
    architectures: list[str] | None = None
    kept_dtypes: dict[str, Dtype] = Field(default_factory=dict)
    tied: dict[str, str] = Field(default_factory=dict)
    vocabulary: int | None = None


class Header(_Stated):
    """What a delta says of itself beside its tensors.

    `labels` is None for a regression and for a language task, which `language` tells of, `recipe`
    for what no recipe made. `kind` is told where rows have something else than one label each.
    `logits` are the marks of the trained model by four fixed inputs ([4, ...]). `composed` tells
    how several deltas, or one scaled, became this one, and `difference` of which two models it is.
    """

    base: Base
    labels: list[str] | None = None
    kind: str | None = None
    language: dict[str, Any] | None = None
    architecture: str | None = None
    recipe: dict[str, Any] | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    logits: list[list[Number]] | None = None
    # These are shown and compared, never computed with: a file by other hands may hold other kinds.
    task: SkipValidation[str | None] = None
    policy: SkipValidation[str | None] = None
    metrics: SkipValidation[dict[str, float | None]] = Field(default_factory=dict)
    composed: SkipValidation[dict[str, Any] | None] = None
    difference: SkipValidation[dict[str, Any] | None] = None


class WeightRow(BaseModel):
    """One changed weight; `positions` and `bits` are the bytes of its two streams."""

    model_config = ConfigDict(strict=True, frozen=True)

    shape: list[Count] = Field(max_length=8)
    dtype: Dtype
    count: int = Field(ge=1)
    positions: Count
    bits: Count
    base: Fingerprint
    trained: Fingerprint

    @model_validator(mode="after")
    def _fits(self) -> "WeightRow":
        if self.count > prod(self.shape) or prod(self.shape) > LARGEST_SIZE:
            raise ValueError(f"{self.count} entries of a weight of shape {self.shape}")
        return self


class Envelope(BaseModel):
    """What the file says of its own contents, apart from the `Header`: `Delta` holds none of it.

    `rest` has eight hex digits of fingerprint for each tensor that the delta leaves alone.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    weights: dict[str, WeightRow]
    digest: str
    rest: str = Field(pattern=r"^([0-9a-f]{8})*$")

    @model_validator(mode="after")
    def _names(self) -> "Envelope":
        for name in self.weights:
            check_name(name)
        return self


ENVELOPE = {"format", "coding", *Envelope.model_fields}  # keys of the JSON that are no `Header`'s


def split_header(values: dict[str, Any]) -> tuple[Envelope, Header]:
    """The two parts of the JSON object in the file.

    Raises ValueError (of pydantic or plain) where a value is of no kind or size that it can have.
    """
    envelope = Envelope.model_validate(values | {"weights": named_rows(values.get("weights"))})
    stated = {key: value for key, value in values.items() if key not in ENVELOPE}
    return envelope, Header.model_validate(stated)


def named_rows(table: object) -> dict[str, dict[str, Any]]:
    """The table of changed weights, whose rows are lists in the file; ValueError for another."""
    fields = list(WeightRow.model_fields)
    if not isinstance(table, dict):
        raise ValueError("its weights are no object")
    for name, row in table.items():
        if not isinstance(row, list) or len(row) != len(fields):
            raise ValueError(f"{name[:80]!r} has no row of {len(fields)}")
    return {name: dict(zip(fields, row, strict=True)) for name, row in table.items()}


def check_name(name: str) -> None:
    """Raises ValueError for what cannot be a parameter's name, such as a path."""
    if not PARAMETER_NAME.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is no name of a parameter")
