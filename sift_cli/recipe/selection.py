"""The section of a recipe that says which entries train."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    WithJsonSchema,
    model_validator,
)

from sift_cli.errors import nearest
from sift_cli.recipe.kinds import (
    Names,
    PositiveInt,
    Section,
    Share,
    checked,
    in_short,
    one_of,
)
from sift_cli.selection.policies import (
    CHANGING,
    COMPARING,
    POLICIES,
    SCHEDULES,
    SCOPES,
    SCORES,
    STRUCTURES,
    Policy,
)

PolicyName = Annotated[str, one_of(list(POLICIES))]


class Option(NamedTuple):
    """A key that only some selections have: those whose `axis` is one of `values`."""

    default: object
    axis: str
    values: tuple[str, ...]

    @property
    def needs(self) -> str:
        """The settings that the key belongs to, as a recipe writes them."""
        return f"{self.axis}: {' or '.join(self.values)}"

    def applies(self, selection: Mapping[str, Any]) -> bool:
        """Whether the key does something there; a score in a file may ask for any option."""
        value = str(selection.get(self.axis))
        return value in self.values or (self.axis == "score" and ".py:" in value)


OPTIONS = {
    "block_size": Option(16, "structure", ("block",)),
    "rank": Option(32, "score", ("low-rank",)),
    "balance": Option(1.0, "score", ("balanced-gradient",)),
    "descent_rate": Option(None, "score", ("sign-descent",)),
    "every": Option(20, "schedule", ("every-n-steps",)),
    "drop": Option(1.0, "schedule", ("every-n-steps",)),
    "revert": Option(False, "schedule", CHANGING),
    "history": Option("keep", "schedule", CHANGING),
    "warmup_steps": Option(50, "schedule", ("after-warmup",)),
    "warmup_trains": Option("head", "schedule", ("after-warmup",)),
    "warmup_learning_rate": Option(None, "schedule", ("after-warmup",)),
}


USUAL_DENSITY = 0.01
DEFAULT_POLICY = "sign-descent"


def policy_row(selection: Any) -> Policy:
    """The row of the policy that a section's values name; that of the default where none is."""
    named = selection.get("policy") if isinstance(selection, dict) else None
    return POLICIES.get(str(named or DEFAULT_POLICY), POLICIES[DEFAULT_POLICY])


def row_options(selection: Mapping[str, Any]) -> dict[str, object]:
    """What the policy's row gives beside its axes; how many batches goes with its score alone.

    A score of another row that compares batches brings the number of its own.
    """
    row, score = policy_row(selection), selection.get("score")
    options = dict(row.defaults)
    if score not in (None, row.score):
        options.pop("batches", None)
        if score in COMPARING:
            options |= POLICIES[str(score)].defaults
    return options


AXES = ("score", "scope", "structure", "schedule")


def _density(value: object) -> object:
    """A share, or shares by pattern; the error is that of the kind that was given."""
    kind: Any = dict[str, Share] if isinstance(value, dict) else Share
    return None if value is None else checked(kind, value)


def _score_name(value: str) -> str:
    file, colon, function = value.rpartition(":")
    if value not in SCORES and not (colon and file.endswith(".py") and function.isidentifier()):
        raise ValueError(f"unknown: {value!r}{nearest(value, SCORES)}, or FILE.py:FUNCTION")
    return value


_SCORE = WithJsonSchema({"anyOf": [{"enum": list(SCORES)}, {"pattern": r"\.py:\w+$"}]})


class SelectionSection(Section):
    """Which entries train."""

    policy: PolicyName = Field(DEFAULT_POLICY, description="a row of the policy table")
    score: Annotated[str, AfterValidator(_score_name), _SCORE] | None = Field(
        None, description="what an entry is worth; or FILE.py:FUNCTION"
    )
    scope: Annotated[str, one_of(SCOPES)] | None = Field(
        None, description="where entries compete for the budget"
    )
    structure: Annotated[str, one_of(STRUCTURES)] | None = Field(
        None, description="what is chosen whole"
    )
    schedule: Annotated[str, one_of(SCHEDULES)] | None = Field(
        None, description="when entries are chosen"
    )
    batches: PositiveInt = Field(
        1,
        description="calibration batches whose gradients are summed; the policy's own if unset",
    )
    density: Annotated[float | dict[str, float] | None, BeforeValidator(_density)] = Field(
        None,
        description="share of the targeted entries, or {default: share, PATTERN: share}; "
        f"{USUAL_DENSITY} if unset",
    )
    budget: PositiveInt | None = Field(None, description="entries in all, instead of a density")
    target: Annotated[str | list[str], in_short("all-linear, all, or name patterns")] = Field(
        "all-linear", description="all-linear, all, or name patterns"
    )
    exclude: Names = Field(default_factory=list, description="name patterns left out")
    dense: Names = Field(
        default_factory=lambda: ["classifier", "score"], description="modules trained whole"
    )
    vectors: bool = Field(
        False,
        description="biases and norms of the base train whole, counted in the budget",
    )
    block_size: PositiveInt | None = Field(None, description="edge of a block")
    rank: PositiveInt | None = Field(None, description="rank of the low-rank score")
    balance: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="how far rows and columns are levelled; 0 is the plain gradient"
    )
    descent_rate: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="of the sign descent that entries are ranked by; train.learning_rate x "
        "sqrt(share of entries that train) / 4 if unset",
    )
    every: PositiveInt | None = Field(None, description="steps between selections")
    drop: Share | None = Field(
        None, description="share of the support that changed least and is chosen anew each time"
    )
    revert: bool | None = Field(None, description="entries that leave go back to the base")
    history: Literal["keep", "reset", "park"] | None = Field(
        None, description="what becomes of Adam's moments when the support changes"
    )
    warmup_steps: PositiveInt | None = Field(None, description="steps before entries are chosen")
    warmup_trains: Literal["head", "all"] | None = Field(
        None, description="what these train; after `all`, weights go back to the base"
    )
    warmup_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="train.learning_rate for the head and 1e-4 for all if unset"
    )

    @model_validator(mode="before")
    @classmethod
    def _row(cls, given: Any) -> Any:
        """Fills what the recipe leaves open: axes and options from the policy, then defaults."""
        if not isinstance(given, dict):
            return given
        row = policy_row(given)
        filled = {**given}
        axes = {axis: getattr(row, axis) for axis in AXES}
        if isinstance(given.get("density"), dict) and row.scope == "global":
            axes["scope"] = "tensor"  # shares by pattern leave no common budget
        if given.get("density") == 1 and row.score in COMPARING:
            axes["score"] = "gradient"  # nothing to compare: one batch tells what has any
        score = given.get("score") or axes["score"]
        for key, value in {**axes, **row_options({**given, "score": score})}.items():
            applies = key not in OPTIONS or OPTIONS[key].applies(filled)
            if filled.get(key) is None and applies:
                filled[key] = value
        for key, option in OPTIONS.items():
            if filled.get(key) is None and option.applies(filled):
                filled[key] = option.default
        return filled

    @model_validator(mode="after")
    def _fits_together(self) -> "SelectionSection":
        if self.density is not None and self.budget is not None:
            raise ValueError("density: give density or budget, not both")
        if self.density is None and self.budget is None:
            object.__setattr__(self, "density", USUAL_DENSITY)
        for key, option in OPTIONS.items():
            if getattr(self, key) is not None and not option.applies(dict(self)):
                raise ValueError(f"{key}: it belongs to {option.needs}, and would do nothing here")
        if isinstance(self.density, dict):
            if "default" not in self.density:
                raise ValueError("density: give the other weights a share too, as `default`")
            if self.scope == "global":
                raise ValueError(
                    "density: under scope global all weights share one budget; patterns need "
                    "scope tensor or neuron"
                )
        if self.scope == "neuron" and self.structure in ("row", "column"):
            raise ValueError(
                f"structure: a {self.structure} is no part of one neuron; scope neuron goes with "
                "entry or block"
            )
        if self.score in COMPARING and self.batches == 1:
            raise ValueError(f"batches: score {self.score} compares batches; give at least 2")
        if self.score == "sign-descent" and (self.period or self.batches) < self.batches:
            raise ValueError(
                f"schedule: a descent of {self.batches} batches every {self.period} steps; give "
                "another score, such as score: gradient, fewer batches, or a larger every"
            )
        if self.score == "change" and self.warmup_trains != "all":
            raise ValueError(
                "score: change is how far a warm-up moved each entry; it needs schedule "
                "after-warmup and warmup_trains: all"
            )
        return self

    @property
    def period(self) -> int | None:
        """Steps between two choices of entries; None where they are chosen once."""
        return 1 if self.schedule == "every-batch" else self.every


def usual_rate(density: float, pace: float = 1.0) -> float:
    """The rate to begin with where such a share of a narrow model's entries trains.

    Adam moves every entry by about the rate, so that fewer entries bear a larger one. As measured
    (docs/quality.md): 1e-4 for all, 4e-3 for 1 %, 3.2e-2 for .1 %, and for less the same. `pace` is
    that of the method.
    """
    power = -0.8 if density > USUAL_DENSITY else -0.9
    return float(f"{pace * 4e-3 * (max(density, 0.001) / USUAL_DENSITY) ** power:.2g}")
