"""The schema of a recipe: its sections, keys, defaults and descriptions. Imports no torch."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    AfterValidator,
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
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from sift_cli.selection.policies import (
    CHANGING,
    POLICIES,
    SCHEDULES,
    SCOPES,
    SCORES,
    STRUCTURES,
)
from sift_cli.tasks.metrics import METRICS
from sift_cli.tasks.table import TASKS

PositiveInt = Annotated[int, Field(gt=0, strict=True)]
Share = Annotated[float, Field(gt=0, le=1)]


def _as_list(value: object) -> object:
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


def _one_of(known: Iterable[str]) -> _OneOf:
    return _OneOf(tuple(known))


def _in_short(expected: str) -> WrapValidator:
    """One message for a value of several types, in place of one for each type."""

    def check(value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise ValueError(f"give {expected}, got {value!r}") from None

    return WrapValidator(check)


def _or_list(item: dict[str, Any]) -> WithJsonSchema:
    """For the JSON schema: one or several."""
    return WithJsonSchema({"anyOf": [item, {"type": "array", "items": item}]})


Names = Annotated[list[str], BeforeValidator(_as_list), _or_list({"type": "string"})]
TaskName = Annotated[str, _one_of([*TASKS, "custom"])]
MetricNames = Annotated[
    list[Annotated[str, _one_of(METRICS)]],
    BeforeValidator(_as_list),
    _or_list({"enum": list(METRICS)}),
]
PolicyName = Annotated[str, _one_of(list(POLICIES))]


class Section(BaseModel):
    """Part of a recipe; a key that it does not know is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelSection(Section):
    """The pre-trained model."""

    path: str = Field(description="hub id, local folder, or pkg:MODULE/SUBDIR")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="how the base weights are held"
    )
    license: str = Field(
        "unknown", description="licence of the tuned model, for its card; often that of the base"
    )


class DataSection(Section):
    """The dataset and how its rows become inputs."""

    path: str = Field(description="hub id, local folder or file, or builtin:NAME")
    task: TaskName = Field(description="a GLUE task, or custom")
    config: str | None = Field(
        None, description="configuration of a hub dataset; the task if unset"
    )
    text: Names | None = Field(
        None, min_length=1, max_length=2, description="one or two text columns"
    )
    label: str | None = Field(None, description="the label column")
    labels: list[str] | None = Field(None, min_length=2, description="label names, in code order")
    metrics: MetricNames | None = Field(
        None, min_length=1, description="the first decides what is best"
    )
    max_length: PositiveInt = Field(128, description="tokens kept of each row")
    max_train_rows: PositiveInt | None = Field(None, description="a seeded sample of the rows")
    holdout: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="share of the training rows to validate on instead of a validation split"
    )

    @model_validator(mode="after")
    def _custom_is_whole(self) -> "DataSection":
        if self.task == "custom" and (self.text is None or self.label is None):
            raise ValueError("task: custom needs data.text (one or two columns) and data.label")
        return self


class Option(NamedTuple):
    """A key that only some selections have: those whose `axis` is one of `values`."""

    default: object
    axis: str
    values: tuple[str, ...]

    @property
    def needs(self) -> str:
        """What it belongs to, as a recipe would say it."""
        return f"{self.axis}: {' or '.join(self.values)}"

    def applies(self, selection: Mapping[str, Any]) -> bool:
        """Whether it does something there; a score of one's own may ask for anything."""
        value = str(selection.get(self.axis))
        return value in self.values or (self.axis == "score" and ".py:" in value)


OPTIONS = {
    "block_size": Option(16, "structure", ("block",)),
    "rank": Option(32, "score", ("low-rank",)),
    "every": Option(20, "schedule", ("every-n-steps",)),
    "drop": Option(1.0, "schedule", ("every-n-steps",)),
    "revert": Option(False, "schedule", CHANGING),
    "history": Option("keep", "schedule", CHANGING),
    "warmup_steps": Option(50, "schedule", ("after-warmup",)),
    "warmup_trains": Option("head", "schedule", ("after-warmup",)),
    "warmup_learning_rate": Option(None, "schedule", ("after-warmup",)),
}
AXES = ("score", "scope", "structure", "schedule")


def _density(value: object) -> object:
    """One share, or patterns with shares; the error is that of what was meant."""
    kind: Any = dict[str, Share] if isinstance(value, dict) else Share
    try:
        return None if value is None else TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{first['loc'][0]}: " if first["loc"] else ""
        said = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        raise ValueError(f"{where}{said}, got {first['input']!r}") from None


def _score_name(value: str) -> str:
    file, colon, function = value.rpartition(":")
    if value not in SCORES and not (colon and file.endswith(".py") and function.isidentifier()):
        raise ValueError(f"unknown: {value!r}{nearest(value, SCORES)}, or FILE.py:FUNCTION")
    return value


_SCORE = WithJsonSchema({"anyOf": [{"enum": list(SCORES)}, {"pattern": r"\.py:\w+$"}]})


class SelectionSection(Section):
    """Which entries train."""

    policy: PolicyName = Field("sift", description="a row of the policy table")
    score: Annotated[str, AfterValidator(_score_name), _SCORE] | None = Field(
        None, description="what an entry is worth; or FILE.py:FUNCTION"
    )
    scope: Annotated[str, _one_of(SCOPES)] | None = Field(
        None, description="where entries compete for the budget"
    )
    structure: Annotated[str, _one_of(STRUCTURES)] | None = Field(
        None, description="what is chosen whole"
    )
    schedule: Annotated[str, _one_of(SCHEDULES)] | None = Field(
        None, description="when entries are chosen"
    )
    batches: PositiveInt = Field(1, description="calibration batches whose gradients are summed")
    density: Annotated[float | dict[str, float] | None, BeforeValidator(_density)] = Field(
        None,
        description="share of the targeted entries, or {default: share, PATTERN: share}; "
        "0.01 if unset",
    )
    budget: PositiveInt | None = Field(None, description="entries in all, instead of a density")
    target: Annotated[str | list[str], _in_short("all-linear, all, or name patterns")] = Field(
        "all-linear", description="all-linear, all, or name patterns"
    )
    exclude: Names = Field(default_factory=list, description="name patterns left out")
    dense: Names = Field(
        default_factory=lambda: ["classifier", "score"], description="modules trained whole"
    )
    block_size: PositiveInt | None = Field(None, description="edge of a block")
    rank: PositiveInt | None = Field(None, description="rank of the low-rank score")
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
        row = POLICIES.get(str(given.get("policy", "sift")), POLICIES["sift"])
        filled = {**given}
        for key, value in {**{axis: getattr(row, axis) for axis in AXES}, **row.defaults}.items():
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
            object.__setattr__(self, "density", 0.01)
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
        if self.score == "change" and self.warmup_trains != "all":
            raise ValueError(
                "score: change is how far a warm-up moved each entry; it needs schedule "
                "after-warmup and warmup_trains: all"
            )
        return self


class TrainSection(Section):
    """The optimisation."""

    epochs: Annotated[float, Field(gt=0)] = 3
    max_steps: PositiveInt | None = Field(None, description="stop after so many steps")
    batch_size: PositiveInt = 32
    max_tokens: PositiveInt | None = Field(
        None,
        description="tokens at once, padding included; a batch of more is computed in parts that "
        "make the same step",
    )
    accumulate: PositiveInt = Field(1, description="batches whose gradients make one step")
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.06, description="share of the steps")
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="bfloat16 autocast or none; auto: bfloat16 on a GPU that has it"
    )
    gradient_checkpointing: bool = False
    offload_optimizer: bool = Field(
        False,
        description="masters, gradients and moments of what trains on the host: 16 bytes an entry "
        "less on the device, and slower",
    )
    skip_nonfinite: Annotated[int, Field(ge=0, strict=True)] = Field(
        0, description="steps to pass over whose loss or gradient is not finite; one more stops"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42


class EvalSection(Section):
    """When to evaluate and which weights to keep."""

    every: Annotated[Literal["epoch"] | PositiveInt, _in_short("epoch or a number of steps")] = (
        Field("epoch", description="epoch, or steps")
    )
    split: str = "validation"
    keep: Literal["best", "last"] = "best"
    batch_size: PositiveInt = Field(256, description="rows at once, at most")
    max_tokens: PositiveInt | None = Field(
        8192, description="tokens at once, padding included, at most"
    )


UNITS = {"s": 1, "min": 60, "h": 3600}


def _interval(value: object) -> object:
    """A number of steps, or a time; None for neither."""
    steps = isinstance(value, int) and not isinstance(value, bool) and value > 0
    time = isinstance(value, str) and re.fullmatch(r"\d*[1-9]\d*(s|min|h)", value)
    if value is None or steps or time:
        return value
    raise ValueError(f"give a number of steps, or a time such as 90s, 10min or 2h, got {value!r}")


class CheckpointSection(Section):
    """When the state of a run is saved, so that it can go on after an interruption."""

    every: Annotated[int | str | None, BeforeValidator(_interval)] = Field(
        500, description="steps, or a time such as 10min; null: only when a signal interrupts"
    )

    @property
    def seconds(self) -> int | None:
        """The time between two, where a time is given."""
        if not isinstance(self.every, str):
            return None
        unit = self.every.lstrip("0123456789")
        return int(self.every.removesuffix(unit)) * UNITS[unit]


class LogSection(Section):
    """Where metrics go besides metrics.jsonl."""

    every: PositiveInt = Field(10, description="steps between logged lines")
    tensorboard: bool = False
    wandb: bool = False
    report: bool = Field(True, description="write report.html and plots after training")


class Recipe(Section):
    """A whole run, every value resolved."""

    model: ModelSection
    data: DataSection
    selection: SelectionSection = Field(default_factory=SelectionSection)
    train: TrainSection = Field(default_factory=TrainSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    log: LogSection = Field(default_factory=LogSection)
    out: str | None = Field(None, description="the run folder; runs/NAME-OF-RECIPE if unset")

    def to_yaml(self) -> str:
        """The resolved recipe as YAML, in the order of the schema."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def nearest(word: str, known: Sequence[str]) -> str:
    """The way out for an unknown word: the known one that is nearest, or all of them."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
