"""The schema of a recipe: its sections, keys, defaults and descriptions. Imports no torch."""

import codecs
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from sift_cli.errors import nearest
from sift_cli.recipe.evaluation import METRIC_SCHEMA, EvalSection, MetricName
from sift_cli.recipe.kinds import (
    Names,
    PositiveInt,
    Section,
    as_list,
    checked,
    one_of,
    or_list,
)
from sift_cli.recipe.selection import SelectionSection, policy_row
from sift_cli.recipe.training import AUTO, TrainSection
from sift_cli.tasks.cells import TAB
from sift_cli.tasks.conversations import FORMATS, NAMES
from sift_cli.tasks.metrics import is_code
from sift_cli.tasks.table import LANGUAGE, TAGGING, TASKS

TaskName = Annotated[str, one_of([*TASKS, "custom", TAGGING, *LANGUAGE])]
MetricNames = Annotated[list[MetricName], BeforeValidator(as_list), or_list(METRIC_SCHEMA)]


class ModelSection(Section):
    """The pre-trained model."""

    path: str = Field(description="hub id, local folder or GGUF file, or pkg:MODULE/PATH")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="how the base weights are held"
    )
    license: str = Field(
        "unknown", description="licence of the tuned model, for its card; often that of the base"
    )


# Keys of rows that only some tasks have, with their defaults there.
ROW_OPTIONS: dict[str, dict[str, object]] = {
    "format": dict.fromkeys(LANGUAGE, AUTO),
    "columns": {task: {} for task in LANGUAGE},
    "template": {"instruct": "model"},
    "system": {"instruct": None},
    "train_on": {"instruct": "all-answers"},
    "too_long": {"instruct": "drop", "text": "split"},
}
LABEL_KEYS = ("text", "label", "labels")  # of the other tasks
LONGEST = 1024  # tokens of a row for a language model, if unset


def _renamed(value: object) -> object:
    """Your names for those of a format."""
    given = None if value is None else checked(dict[str, str], value)
    for name in given or ():
        if name not in NAMES:
            raise ValueError(f"no format has the name {name!r}{nearest(name, NAMES)}")
    return given


def _delimiter(value: object) -> object:
    """One character; a tab may be spelt."""
    value = TAB if value in ("tab", "\\t") else value
    if value is None or (isinstance(value, str) and len(value) == 1 and value not in '"\r\n'):
        return value
    raise ValueError(f"give one character, or tab, got {value!r}")


def _encoding(value: object) -> object:
    """The name of an encoding of text."""
    try:
        if value is not None:
            codecs.lookup(str(value))
    except LookupError:
        raise ValueError(f"no such encoding: {value!r}; cp1252 and utf-16 are some") from None
    return value


def _label(value: object) -> object:
    """A column, or at least two."""
    if isinstance(value, list) and (len(value) < 2 or not all(isinstance(x, str) for x in value)):
        raise ValueError(f"give a column, or at least two, got {value!r}")
    return value


class DataSection(Section):
    """The dataset and how its rows become inputs."""

    path: str = Field(description="hub id, local folder or file, or builtin:NAME")
    task: TaskName = Field(
        description="a GLUE task, custom, tags (of words), instruct (answers are learnt), or text"
    )
    config: str | None = Field(
        None, description="configuration of a hub dataset; the task if unset"
    )
    delimiter: Annotated[str | None, BeforeValidator(_delimiter)] = Field(
        None, description="what parts the cells of .csv and .tsv files; found if unset"
    )
    encoding: Annotated[str | None, BeforeValidator(_encoding)] = Field(
        None, description="that of .csv and .tsv files, such as cp1252; UTF-8 if unset"
    )
    text: Names | None = Field(
        None, min_length=1, max_length=2, description="one or two text columns"
    )
    label: Annotated[str | list[str] | None, BeforeValidator(_label)] = Field(
        None,
        description="the label column; lists in it are any of several labels, as are several "
        "columns, one a label, that hold 0 or 1",
    )
    labels: list[str] | None = Field(None, min_length=2, description="label names, in code order")
    metrics: MetricNames | None = Field(
        None,
        min_length=1,
        description="the first decides what is best; precision, recall and f1 are of class 1, "
        "NAME:CLASS of another; FILE.py:FUNCTION is one of your own; loss, which is always among "
        "them, is the mean over rows, over supervised tokens for language tasks",
    )
    format: Annotated[str, one_of([AUTO, *FORMATS])] | None = Field(
        None, description="how rows are laid out; auto: as their columns tell"
    )
    columns: Annotated[dict[str, str] | None, BeforeValidator(_renamed)] = Field(
        None, description="your names for those of a format, such as {instruction: question}"
    )
    template: str | None = Field(
        None, description="the chat template: model (its own), alpaca, chatml or FILE.jinja"
    )
    system: str | None = Field(None, description="put before rows that have no system turn")
    train_on: Literal["all-answers", "last-answer", "all-tokens"] | None = Field(
        None, description="what is learnt of a row"
    )
    too_long: Literal["drop", "cut-end", "error", "split"] | None = Field(
        None, description="what becomes of rows of more than max_length tokens; split: texts only"
    )
    max_length: PositiveInt = Field(
        128, description=f"tokens kept of each row; {LONGEST:,} for instruct and text if unset"
    )
    max_train_rows: PositiveInt | None = Field(None, description="a seeded sample of the rows")
    holdout: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="share of the training rows to validate on instead of a validation split"
    )
    inner_holdout: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="share of the rows left to train on to evaluate on instead of eval.split: to "
        "choose settings without a look at it",
    )

    @property
    def expected(self) -> tuple[str, list[str] | None, bool]:
        """What is known without the rows: the task, its labels, and that there are several."""
        columns = self.label if isinstance(self.label, list) else None
        return self.task, self.labels or columns, columns is not None

    @model_validator(mode="before")
    @classmethod
    def _as_the_task_has_it(cls, given: Any) -> Any:
        """Fills what the recipe leaves open of keys that its task has."""
        task = given.get("task") if isinstance(given, dict) else None
        if task not in LANGUAGE:
            return given
        usual = {key: row[task] for key, row in ROW_OPTIONS.items() if task in row}
        usual["max_length"] = LONGEST
        return {**given, **{k: v for k, v in usual.items() if given.get(k) is None}}

    @model_validator(mode="after")
    def _keys_fit_the_task(self) -> "DataSection":
        for key, row in ROW_OPTIONS.items():
            if getattr(self, key) is not None and self.task not in row:
                raise ValueError(
                    f"{key}: it belongs to task: {' or '.join(row)}, and would do nothing here"
                )
        if self.task not in LANGUAGE:
            return self
        for key in LABEL_KEYS:
            if getattr(self, key) is not None:
                raise ValueError(
                    f"{key}: rows of task: {self.task} have no labels; what their columns are "
                    "called is said by data.columns"
                )
        if self.format != AUTO and (self.format == "text") != (self.task == "text"):
            raise ValueError(
                f"format: rows of {self.format} are for task: "
                f"{'text' if self.format == 'text' else 'instruct'}, not {self.task}"
            )
        if self.too_long == "split" and self.task != "text":
            raise ValueError("too_long: an answer is not split from its question; only texts are")
        return self

    @model_validator(mode="after")
    def _a_name_for_each_column(self) -> "DataSection":
        if isinstance(self.label, list) and len(self.labels or self.label) != len(self.label):
            raise ValueError(f"labels: {len(self.label)} columns of labels need as many names")
        return self

    @model_validator(mode="after")
    def _tags_have_one_column_each(self) -> "DataSection":
        for key in ("text", "label") if self.task == TAGGING else ():
            if isinstance(value := getattr(self, key), list) and len(value) > 1:
                raise ValueError(f"{key}: task: {TAGGING} takes one column, of lists")
        return self

    @model_validator(mode="after")
    def _custom_is_whole(self) -> "DataSection":
        if self.task == "custom" and (self.text is None or self.label is None):
            raise ValueError("task: custom needs data.text (one or two columns) and data.label")
        return self


UNITS = {"s": 1, "min": 60, "h": 3600}


def _interval(value: object) -> object:
    """Takes a number of steps, a time such as 10min, or null."""
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
        """The seconds between two checkpoints, where `every` is a time."""
        if not isinstance(self.every, str):
            return None
        unit = self.every.lstrip("0123456789")
        return int(self.every.removesuffix(unit)) * UNITS[unit]


class LogSection(Section):
    """Where metrics go besides metrics.jsonl."""

    every: PositiveInt = Field(
        10,
        description="steps between lines of metrics.jsonl; without a terminal, "
        "ten of them are printed in all",
    )
    tensorboard: bool = False
    wandb: bool = False
    report: bool = Field(True, description="write report.html and plots after training")


# Keys outside `data` that language tasks alone have, and those of rows with a label each.
TOKEN_KEYS = ("train.tokens", "train.packing", "train.chunk_loss", "eval.samples", "eval.generate")
CLASS_KEYS = ("train.class_weights", "train.label_smoothing")


def keys_of_others(task: str) -> dict[str, str]:
    """Keys outside `data` that do nothing for a task, and what they belong to."""
    of_tokens = dict.fromkeys(TOKEN_KEYS, f"task: {' or '.join(LANGUAGE)}")
    of_classes = dict.fromkeys(CLASS_KEYS, "rows with a label each")
    if task in LANGUAGE:
        return of_classes
    return of_tokens | of_classes if task == TAGGING else of_tokens


class DistributedSection(Section):
    """How several processes share the model; for one alone it says nothing."""

    shard: Literal["none", "full"] = Field(
        "none",
        description="none: each holds the whole base; full: each holds some rows of every weight, "
        "with the masters and moments of its own entries (FSDP2)",
    )
    replicas: PositiveInt = Field(
        1,
        description="of shard: full, so many copies of the model, each in rows on as many "
        "processes as are left for it (HSDP): one a node, so that only gradients leave it",
    )

    @model_validator(mode="after")
    def _replicas_are_of_rows(self) -> "DistributedSection":
        if self.replicas > 1 and self.shard == "none":
            raise ValueError("replicas: each process holds the whole model; give shard: full")
        return self


class Recipe(Section):
    """A whole run, every value resolved."""

    model: ModelSection
    data: DataSection
    selection: SelectionSection = Field(default_factory=SelectionSection)
    train: TrainSection = Field(default_factory=TrainSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    distributed: DistributedSection = Field(default_factory=DistributedSection)
    log: LogSection = Field(default_factory=LogSection)
    out: str | None = Field(None, description="the run folder; runs/NAME-OF-RECIPE if unset")

    @model_validator(mode="before")
    @classmethod
    def _train_as_the_policy_does(cls, given: Any) -> Any:
        """Fills what the recipe leaves open of training from the policy, where its row says it."""
        train = given.get("train", {}) if isinstance(given, dict) else None
        if not isinstance(train, dict):
            return given
        row = policy_row(given.get("selection")).train
        open_keys = {key: value for key, value in row.items() if train.get(key) is None}
        return {**given, "train": {**train, **open_keys}} if open_keys else given

    @model_validator(mode="after")
    def _keys_outside_data_fit_the_task(self) -> "Recipe":
        for name, belongs in keys_of_others(self.data.task).items():
            section, _, key = name.partition(".")
            part = getattr(self, section)
            usual = type(part).model_fields[key].default
            if getattr(part, key) not in (usual, False):
                raise ValueError(f"{name}: it belongs to {belongs}, and would do nothing here")
        return self

    @model_validator(mode="after")
    def _rows_on_ranks_fit(self) -> "Recipe":
        if self.distributed.shard == "none":
            return self
        for section, key, able in (
            ("selection", "structure", ("entry", "row")),
            ("train", "step_scale", ("none",)),
        ):
            given = getattr(getattr(self, section), key)
            if given not in (None, *able):
                raise ValueError(
                    f"distributed.shard: full goes with {section}.{key}: {' or '.join(able)}, and "
                    f"it is {given}; give that, another selection.policy, or shard: none"
                )
        return self

    @model_validator(mode="after")
    def _rows_fit_in_a_step(self) -> "Recipe":
        tokens, longest = self.train.tokens, self.data.max_length
        if tokens is not None and tokens < longest:
            raise ValueError(
                f"train.tokens: a step of {tokens:,} tokens holds no row of data.max_length "
                f"{longest:,}; give as many or more"
            )
        return self

    @property
    def metric_names(self) -> list[str]:
        """The metrics that it names."""
        return [*(self.data.metrics or ()), *([self.eval.metric] if self.eval.metric else ())]

    def without_code(self) -> "Recipe":
        """The recipe with no metrics that are code."""
        names = [name for name in self.data.metrics or () if not is_code(name)]
        first = self.eval.metric
        data = self.data.model_copy(update={"metrics": names or None})
        metric = None if first is None or is_code(first) else first
        evaluation = self.eval.model_copy(update={"metric": metric})
        return self.model_copy(update={"data": data, "eval": evaluation})

    def to_yaml(self) -> str:
        """The resolved recipe as YAML, in the order of the schema."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
