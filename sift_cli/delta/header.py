"""What a delta file's header may say: read before anything that it describes."""

import re
from math import prod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from sift_cli.delta.coding import LARGEST_SIZE

NAME = re.compile(r"[\w-]+(\.[\w-]+)*")  # of a parameter: words with dots between

Dtype = Literal["float64", "float32", "float16", "bfloat16"]

Count = Annotated[int, Field(ge=0, lt=LARGEST_SIZE)]
Fingerprint = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class Row(_Strict):
    """One changed weight; `positions` and `bits` are bytes of its streams."""

    shape: list[Count] = Field(max_length=8)
    dtype: Dtype
    count: int = Field(ge=1)
    positions: Count
    bits: Count
    base: Fingerprint
    trained: Fingerprint

    @model_validator(mode="after")
    def _fits(self) -> "Row":
        if self.count > prod(self.shape) or prod(self.shape) > LARGEST_SIZE:
            raise ValueError(f"{self.count} entries of a weight of shape {self.shape}")
        return self


class Base(_Strict):
    """The model that the delta changes."""

    path: str
    dtype: Dtype
    revision: str | None = None
    architectures: list[str] | None = None
    kept_dtypes: dict[str, Dtype] = Field(default_factory=dict)
    tied: dict[str, str] = Field(default_factory=dict)
    vocabulary: int | None = None


class Header(_Strict):
    """The whole of it; what describes the run is held to its kind where others rely on it."""

    weights: dict[str, Row]
    digest: str
    rest: str = Field(pattern=r"^([0-9a-f]{8})*$")
    base: Base
    labels: list[str] | None = None
    architecture: str | None = None
    recipe: dict[str, Any] | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    logits: list[list[float]] | None = None

    @model_validator(mode="after")
    def _names(self) -> "Header":
        for name in self.weights:
            check_name(name)
        return self


def named_rows(table: object) -> dict[str, dict[str, Any]]:
    """The table of changed weights, whose rows are lists in the file; ValueError for another."""
    fields = list(Row.model_fields)
    if not isinstance(table, dict):
        raise ValueError("its weights are no object")
    for name, row in table.items():
        if not isinstance(row, list) or len(row) != len(fields):
            raise ValueError(f"{name[:80]!r} has no row of {len(fields)}")
    return {name: dict(zip(fields, row, strict=True)) for name, row in table.items()}


def check_name(name: str) -> None:
    """Raises ValueError for what cannot be a parameter's name, such as a path."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is no name of a parameter")
