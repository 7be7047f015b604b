"""The section of a recipe on evaluation. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from sift_cli.recipe.kinds import PositiveInt, Section, in_short


class GenerateSection(Section):
    """How prompts are answered: with the likeliest token each time."""

    max_new_tokens: PositiveInt = Field(256, description="tokens of an answer, at most")


class EvalSection(Section):
    """When to evaluate and which weights to keep."""

    every: Annotated[Literal["epoch"] | PositiveInt, in_short("epoch or a number of steps")] = (
        Field("epoch", description="epoch, or steps")
    )
    split: str = "validation"
    keep: Literal["best", "last"] = "best"
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
