"""The section of a recipe on evaluation. Imports no torch."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from sift_cli.errors import nearest
from sift_cli.recipe.kinds import PositiveInt, Section, in_short
from sift_cli.tasks.metrics import METRICS, ONE_CLASS, is_metric


def _metric_name(value: str) -> str:
    if not is_metric(value):
        known = nearest(value, list(METRICS))
        code = "" if known.endswith("?") else ", or FILE.py:FUNCTION"
        raise ValueError(f"unknown: {value!r}{known}{code}")
    return value


METRIC_SCHEMA = {
    "anyOf": [
        {"enum": list(METRICS)},
        {"pattern": rf"^({'|'.join(ONE_CLASS)}):."},
        {"pattern": r"\.py:\w+$"},
    ]
}
MetricName = Annotated[str, AfterValidator(_metric_name), WithJsonSchema(METRIC_SCHEMA)]


class GenerateSection(Section):
    """How prompts are answered: with the likeliest token each time."""

    max_new_tokens: PositiveInt = Field(256, description="tokens of an answer, at most")


class EvalSection(Section):
    """When to evaluate and which weights to keep."""

    every: Annotated[Literal["epoch"] | PositiveInt, in_short("epoch or a number of steps")] = (
        Field("epoch", description="epoch, or steps")
    )
    before: bool = Field(True, description="evaluate before training as well")
    split: str = "validation"
    keep: Literal["best", "last"] = "best"
    metric: MetricName | None = Field(
        None, description="the one that decides what is best; the first of data.metrics if unset"
    )
    patience: PositiveInt | None = Field(
        None,
        description="training stops after so many evaluations in a row that are no better than the "
        "best one; unset: never before its last step",
    )
    batch_size: PositiveInt = Field(256, description="rows at once, at most")
    max_tokens: PositiveInt | None = Field(
        8192, description="tokens at once, padding included, at most"
    )
    samples: Annotated[int, Field(ge=0, strict=True)] = Field(
        0,
        description="held-out prompts that language tasks answer at each evaluation and before "
        "training, into samples.jsonl",
    )
    generate: GenerateSection = Field(GenerateSection(), description="how they are answered")

    @model_validator(mode="after")
    def _patience_keeps_the_best(self) -> "EvalSection":
        if self.patience is not None and self.keep == "last":
            raise ValueError("patience: it stops some evaluations after the best; give keep: best")
        return self
