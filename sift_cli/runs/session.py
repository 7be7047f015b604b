"""A recipe made real: its task, model, tokenised rows and device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sift_cli.models.devices import pick_device
from sift_cli.models.fingerprints import state_fingerprints
from sift_cli.models.loading import (
    DTYPES,
    LoadedModel,
    base_config,
    check_length,
    load_model,
    model_folder,
)
from sift_cli.recipe import ModelSection, Recipe, TrainSection
from sift_cli.runs.language import language_task
from sift_cli.runs.ranks import ALONE, Ranks
from sift_cli.runs.sources import source_of
from sift_cli.sparse.local import Shards
from sift_cli.tasks.evaluation import collect_outputs
from sift_cli.tasks.labelled import load_task
from sift_cli.tasks.metrics import Metric, Metrics, shown
from sift_cli.tasks.own_metrics import own_metrics
from sift_cli.tasks.table import LANGUAGE, TAGGING
from sift_cli.tasks.tagged import load_tagging
from sift_cli.tasks.task import Task
from sift_cli.tasks.token_rows import SplitCounts
from sift_cli.tasks.tokens import Encoded, require_readable

if TYPE_CHECKING:
    from sift_cli.models.sharding import Sharded


@dataclass(frozen=True)
class Session:
    """What training and evaluation work on; `train` is None where only evaluation was asked for.

    `new` names the parameters that the base's checkpoint did not hold, `bf16` tells whether forward
    passes run under bfloat16 autocast. `notes` are what to tell of the task on this model, `ranks`
    the processes that share the work, `sharded` how its weights lie on them, where each has a part.
    """

    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new: tuple[str, ...]
    train: Encoded | None
    evaluation: dict[str, Encoded]
    device: torch.device
    bf16: bool
    eval_batch_size: int
    eval_max_tokens: int | None
    notes: tuple[str, ...] = ()
    ranks: Ranks = ALONE
    sharded: "Sharded | None" = None

    @property
    def shards(self) -> Shards | None:
        """How the model's weights lie on several ranks; None where each holds all of them."""
        return None if self.sharded is None else self.sharded.shards

    def keeping_step(self) -> "Session":
        """The same where all ranks do all of the work, and what the main one does counts."""
        return replace(self, ranks=Ranks(rank=self.ranks.rank))

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each tensor of the base, by name, before anything trains."""
        if self.sharded is None:
            return state_fingerprints(self.model, ())
        names = self.sharded.names
        own = {name: self.sharded.mark(name) for name in names[self.ranks.rank :: self.ranks.world]}
        every = {name: mark for some in self.ranks.gather(own) for name, mark in some.items()}
        return {name: every[name] for name in names}

    def alone(self) -> "Session":
        """The same where this process does all of the work."""
        return replace(self, ranks=ALONE)

    @property
    def one_dropout(self) -> bool:
        """Whether ranks give each row the dropout that it has in a run of one process."""
        return self.ranks.exact and not self.task.packs

    def collate(self, features: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor]:
        """One batch of rows to train on, as the task lays them out."""
        return self.task.collate(features, self.tokenizer, packs=self.task.packs)

    def counted(self, rows: Sequence[Sequence[int]]) -> float:
        """What the mean loss of a step is the mean of; `rows` are its micro-batches."""
        assert self.train is not None
        return sum(self.task.counted(self.train, part) for part in rows)

    def predict(self) -> dict[str, Tensor]:
        """The outputs of every row to evaluate on, fp32 [N, ...], by the split's suffix.

        Rows of like length are padded: end to end, attention would cost the square of a batch.
        Each rank runs some of the batches, and has all outputs.
        Raises SiftError (exit code 4) where they are not finite.
        """
        return {
            suffix: collect_outputs(
                self.task,
                self.model,
                data,
                partial(self.task.collate, tokenizer=self.tokenizer),
                batch_size=self.eval_batch_size,
                max_tokens=self.eval_max_tokens,
                bf16=self.bf16,
                each=self.ranks.each,
            )
            for suffix, data in self.evaluation.items()
        }

    def score(self, outputs: Mapping[str, Tensor]) -> dict[str, float | None]:
        """The task's metrics of what `predict` returned, each with the suffix of its split."""
        return self.ranks.on_main(
            lambda: {
                name + suffix: value
                for suffix, data in self.evaluation.items()
                for name, value in self.task.score(outputs[suffix], data).items()
            }
        )

    def lines(self, outputs: Mapping[str, Tensor]) -> dict[str, list[dict[str, Any]]]:
        """What the task says of each row of what `predict` returned, by the split's suffix."""
        return {
            suffix: self.task.lines(outputs[suffix], self.task.evaluation[suffix], data)
            for suffix, data in self.evaluation.items()
        }

    def evaluate(self) -> dict[str, float | None]:
        """The task's metrics of the model as it is now."""
        return self.score(self.predict())

    @property
    def learns_tokens(self) -> bool:
        """Whether tokens are what is learnt, as language tasks do."""
        return any(rows.targets for rows in self.splits.values())

    @property
    def splits(self) -> dict[str, Encoded]:
        """The rows by what they are for: `train`, `evaluation` and its suffixes."""
        return by_split(self.train, self.evaluation)

    def truncated(self) -> dict[str, int]:
        """Rows cut to `data.max_length`, by split."""
        return {name: rows.truncated for name, rows in self.splits.items()}

    def counts(self) -> dict[str, dict[str, Any]] | None:
        """Rows, tokens, and what was dropped and cut, by split; None where none is learnt from."""
        if not self.learns_tokens:
            return None
        return {name: SplitCounts.of(rows).to_json() for name, rows in self.splits.items()}


def load_rows(
    recipe: Recipe,
    *,
    train: bool = True,
    split: str | None = None,
    own: Mapping[str, Metric] | None = None,
) -> Task:
    """The recipe's task with its rows, checked; `own` are those of its metrics that are code."""
    data = recipe.data
    if data.task in LANGUAGE:
        return language_task(recipe, train=train, split=split)
    if data.task == TAGGING:
        assert not isinstance(data.label, list)
        return load_tagging(
            source_of(recipe, split),
            text=data.text,
            label=data.label,
            labels=data.labels,
            metrics=data.metrics,
            first=recipe.eval.metric,
            train=train,
        )
    return load_task(
        source_of(recipe, split),
        text=data.text,
        label=data.label,
        labels=data.labels,
        metrics=data.metrics,
        first=recipe.eval.metric,
        own=own,
        class_weights=recipe.train.class_weights,
        label_smoothing=recipe.train.label_smoothing,
        train=train,
    )


def open_session(
    recipe: Recipe,
    *,
    device: str | None = None,
    train: bool = True,
    split: str | None = None,
    tuned: LoadedModel | None = None,
    allow_code: bool = False,
    ranks: Ranks = ALONE,
) -> Session:
    """Loads and checks everything that the recipe names, cheapest mistakes first.

    `tuned` stands in for the recipe's model. The head that a base lacks is drawn from `train.seed`.
    `allow_code` lets its metrics name functions in files.
    """
    where, sharded = ranks.place(pick_device(device)), None
    data = recipe.data
    own = own_metrics(recipe.metric_names, allow_code)
    with ranks.first_here():
        folder = None if tuned else model_folder(recipe.model.path, recipe.model.revision)
        task = load_rows(recipe, train=train, split=split, own=own)
    if tuned is None:
        assert folder is not None
        torch.manual_seed(recipe.train.seed)
        before = base_config(folder)
        task = task.on_head(before)
        config = task.configure(folder)
        dtype, new_head = DTYPES[recipe.model.dtype], train and task.new_head
        if ranks.even:
            from sift_cli.models.sharding import load_sharded, mesh_of  # slow to import

            mesh = mesh_of(where, recipe.distributed.replicas)
            tuned, sharded = load_sharded(
                folder, task.auto, config, dtype, mesh, where, new_head=new_head
            )
        else:
            tuned = load_model(folder, task.auto, config, dtype, new_head=new_head)
        head = task.told_head(before, bool(tuned.new))
    else:
        task, head = task.fitted(tuned.model.config), None
    tuned.model.to(where)  # type: ignore[arg-type]
    check_length(data.max_length, tuned.model, tuned.tokenizer)
    settings = recipe.train
    task, said = task.ready(tuned, packs=settings.packs, chunk_loss=settings.chunk_loss)
    with ranks.first_here():
        rows, evaluation = encoded(
            task, tuned.tokenizer, tuned.model.config, data.max_length, split or recipe.eval.split
        )
    return Session(
        task=task,
        model=tuned.model,
        tokenizer=tuned.tokenizer,
        new=tuned.new,
        train=rows,
        evaluation=evaluation,
        device=where,
        bf16=autocasts(recipe.model, recipe.train, where),
        eval_batch_size=recipe.eval.batch_size,
        eval_max_tokens=recipe.eval.max_tokens,
        notes=(*([head] if head else []), *tuned.notes, *said),
        ranks=ranks,
        sharded=sharded,
    )


def encoded(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    max_length: int,
    split: str,
) -> tuple[Encoded | None, dict[str, Encoded]]:
    """The task's rows as tokens: those to train on, None where it has none, and to evaluate on.

    `split` is what the last are called. Raises SiftError for rows that a model of `config` cannot
    read.
    """

    def read(rows: Any, name: str) -> Encoded:
        data = task.encode(rows, tokenizer, max_length)
        require_readable(data, config, f"data: the {name} split has")
        return data

    train = None if task.train is None else read(task.train, "train")
    return train, {key: read(rows, split + key) for key, rows in task.evaluation.items()}


def by_split(train: Encoded | None, evaluation: Mapping[str, Encoded]) -> dict[str, Encoded]:
    """The rows by what they are for: `train`, `evaluation` and its suffixes."""
    splits = {"evaluation" + suffix: rows for suffix, rows in evaluation.items()}
    return splits if train is None else {"train": train, **splits}


def autocasts(model: ModelSection, train: TrainSection, device: torch.device) -> bool:
    """Whether to run under bfloat16 autocast; a bfloat16 base computes in bfloat16 without it."""
    if train.precision != "auto":
        return train.precision == "bfloat16"
    fits = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return fits and model.dtype == "float32"


def tell_emulated(
    model: ModelSection, train: TrainSection, device: torch.device, console: Console
) -> None:
    """Says which key asks for bfloat16 where the CPU has no arithmetic for it.

    Products then run on code that is not blocked, some 20 times slower than in float32.
    """
    key = "train.precision" if autocasts(model, train, device) else "model.dtype"
    asked = key == "train.precision" or model.dtype == "bfloat16"
    if not asked or device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        console.print(f"{key}: this CPU emulates bfloat16, many times slower than float32")


def tell_undefined(metrics: Metrics, console: Console) -> None:
    """Says which metrics of the base are undefined: on data of one class they stay so."""
    names = [name for name, value in metrics.items() if value is None]
    if names:
        console.print(
            f"{', '.join(names)}: undefined before training, since all labels or all predictions "
            "are the same",
            highlight=False,
        )


def tell_no_better(task: Task, metrics: Metrics, before: Metrics, console: Console) -> None:
    """Says where the weights that are kept score no better than the base did; not without that."""
    name = next(iter(metrics))
    if before.get(name) is not None and not task.better(metrics, before):
        console.print(
            f"{name} is no better than before training: {shown(metrics[name])}, and "
            f"{shown(before[name])} then",
            highlight=False,
        )
