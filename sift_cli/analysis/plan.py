"""What a recipe will train, and what it needs, before anything is trained or even loaded.

The model is built on the meta device from its configuration: counts need no weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

from sift_cli.analysis.memory import Batch, PeakMemory, ordinary, sparse
from sift_cli.analysis.methods import adapt, adapted_layers, rank_for
from sift_cli.analysis.planned import Passes, PlannedRows, computed, read_task
from sift_cli.analysis.sharded import Rows, ranks_of
from sift_cli.analysis.sizes import accounting, delta_bytes, grouped, sent
from sift_cli.errors import SiftError
from sift_cli.models.devices import pick_device
from sift_cli.models.loading import DTYPES, WEIGHTS, model_folder, on_meta, padding_of
from sift_cli.models.names import head_of
from sift_cli.models.prepare import Recompute, prepare_model, recompute_of
from sift_cli.models.stored import Stored
from sift_cli.models.whole import Lack, require_whole
from sift_cli.recipe import Recipe
from sift_cli.runs.language import with_template
from sift_cli.runs.session import autocasts, open_session
from sift_cli.runs.timing import Timing
from sift_cli.selection.scores import find_score
from sift_cli.selection.select import require_by_rows
from sift_cli.selection.targets import left_out, transposed_of
from sift_cli.tasks.kinds import expected_task
from sift_cli.tasks.task import Task
from sift_cli.training.batches import steps_of
from sift_cli.training.choosing import selecting
from sift_cli.training.head import start_of, targets_for
from sift_cli.training.parts import Parts, rule_in, rule_of
from sift_cli.training.rates import at_usual_rate
from sift_cli.training.step import take_step
from sift_cli.training.warmup import warmed
from sift_cli.training.watch import Watch

STEPS = 3  # timed, after one that warms up
HOST_IF_OFFLOADED = ("masters", "gradients", "moments")


def plan(
    recipe: Recipe,
    *,
    device: str | None = None,
    devices: int = 1,
    memory: int | None = None,
    measure: bool = False,
    allow_code: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Counts, memory by part, the delta's size, rows and steps; with `measure` the time as well.

    Where `devices` share the steps, memory is that of each, and `sent_bytes` what each sends in a
    step, of a model in rows also `sent_by_part`. `memory` stands in for that of the device, in
    bytes. Rows are counted where they and the tokenizer are on this machine. Raises SiftError for
    what the recipe gets wrong.
    """
    console = console or Console(stderr=True, quiet=True)
    where = pick_device(device)
    outline = Outline.of(recipe, allow_code, devices)
    result = outline.counted()
    result |= memory_of(outline, where, console, devices)
    if devices > 1:
        result |= {"devices": devices, **outline.sent(where, devices)}
    result["device"] = fits(result, where, memory)
    if measure:
        result["measured"] = measured(recipe, where, allow_code, console)
    return result


@dataclass(frozen=True)
class Outline:
    """A recipe with its model on the meta device, and what of it trains.

    `counts` entries of each weight within the budget, all of those that `parts` calls vectors, and
    the parameters `dense` whole.
    """

    recipe: Recipe
    rows: PlannedRows
    build: Callable[[], Any]
    model: Any
    parts: Parts
    counts: dict[str, int]
    head_start: str
    in_rows: Rows | None = None

    @classmethod
    def of(cls, recipe: Recipe, allow_code: bool = False, devices: int = 1) -> Outline:
        """Reads the configuration of the model, and the rows where they are on this machine.

        Where the recipe deals the model over the `devices`, `in_rows` says how.

        Raises what training raises before its first step, but for what weights alone can tell.
        """
        recipe = with_template(recipe)
        rule = rule_in(recipe, allow_code)
        ranks = ranks_of(recipe, devices)
        folder = model_folder(recipe.model.path, recipe.model.revision, weights=False)
        expected_task(*recipe.data.expected).configure(folder)  # or it raises
        task, missing = read_task(recipe)
        config = task.configure(folder)
        if padding_of(config) is None:
            config.get_text_config().pad_token_id = 0
        build = partial(on_meta, folder, task.auto, config, DTYPES[recipe.model.dtype])
        model = build()
        rows = PlannedRows.of(recipe, task, missing, folder, model)
        new = _new_head(task.new_head, model, folder)
        start = start_of(recipe.train, task, model)
        parts = Parts.of(recipe.selection, model, new, rule)
        _require_beginning(recipe, rows, parts)
        in_rows = None
        if ranks.even:
            require_by_rows(rule, transposed_of(model, parts.sparse))
            in_rows = Rows.of(model, devices, recipe.distributed.replicas)
        start, counts = start if new else "random", parts.planned(model)
        return cls(recipe, rows, build, model, parts, counts, start, in_rows)

    @property
    def dense(self) -> Sequence[str]:
        """The parameters that train whole beside the budget."""
        return self.parts.dense

    @property
    def recompute(self) -> Recompute:
        """What `train.gradient_checkpointing` means for this model."""
        return recompute_of(self.model, self.recipe.train.gradient_checkpointing)

    @property
    def entries(self) -> int:
        """How many entries train, without the modules that train whole."""
        return sum(self.counts.values())

    @property
    def trained(self) -> dict[str, int]:
        """How many entries of each weight train, those of `dense` among them."""
        return self.counts | {name: self.model.get_parameter(name).numel() for name in self.dense}

    def task_on(self, device: torch.device) -> Task:
        """The task as the device would have it."""
        settings = self.recipe.train
        return self.rows.task.expected(
            self.model.config,
            device.type,
            packs=settings.packs,
            chunk_loss=settings.chunk_loss,
        )

    def sent(self, device: torch.device, devices: int) -> dict[str, Any]:
        """What each of the devices sends in a step."""
        recipe, task, trained = self.recipe, self.task_on(device), self.trained
        if self.in_rows is None:
            total = sum(weight.numel() for weight in self.model.parameters())
            sends = sent(sum(trained.values()), total, recipe.model.dtype, devices)
            return {"sent_bytes": sends}
        # On a CPU every rank walks through all padded micro-batches.
        dealt = devices if device.type == "cuda" or task.packs else 1
        batches = self.rows.micro_batches(recipe, task, dealt)
        return self.in_rows.sent_of(self.model, trained, recipe.model.dtype, batches)

    @property
    def whole(self) -> bool:
        """Whether all of the targeted entries train, so that none has to be chosen."""
        sizes = {name: weight.numel() for name, weight in self.model.named_parameters()}
        return all(count == sizes[name] for name, count in self.counts.items())

    @property
    def left_out(self) -> dict[str, int]:
        """The sizes of the weights that `all-linear` goes past, though they are no embeddings."""
        return left_out(self.model, self.recipe.selection.target, self.parts.all)

    def counted(self) -> dict[str, Any]:
        """All of a plan but memory and time: entries, rows, steps and the delta's bytes."""
        recipe, counts = self.recipe, self.counts
        sizes = {name: weight.numel() for name, weight in self.model.named_parameters()}
        return {
            "model": recipe.model.path,
            "architecture": type(self.model).__name__,
            "policy": recipe.selection.policy,
            "trained_entries": self.entries,
            "vector_entries": sum(sizes[name] for name in self.parts.vectors),
            "dense_entries": sum(sizes[name] for name in self.dense),
            "total_entries": sum(sizes.values()),
            "by_layer": grouped(counts, sizes, 0),
            "by_kind": grouped(counts, sizes, 1),
            "whole": self.whole,
            "only_in_sum": recipe.selection.scope == "global" and not self.whole,
            "left_out": grouped(self.left_out, self.left_out, 1),
            "head_start": self.rows.head(self.head_start),
            "data": self.rows.about(recipe, self.parts.rule),
            "delta_bytes": delta_bytes(counts, sizes, self.dense, recipe.model.dtype),
            "published_accounting": accounting(self.model, self.entries),
        }


def _require_beginning(recipe: Recipe, rows: PlannedRows, parts: Parts) -> None:
    """Raises SiftError where training could start no head or warm-up."""
    start, chosen = recipe.train.head_start, recipe.selection
    if start not in ("random", "auto") and rows.train is not None:
        targets_for(start, rows.task, rows.train)
    if chosen.schedule == "after-warmup":
        warmed(chosen.warmup_trains == "all", [*parts.sparse, *parts.vectors], parts.dense)


def _new_head(new_head: bool, model: Any, folder: Path) -> Sequence[str]:
    """The parameters that training would draw anew; without weight files, those of any new head.

    Raises SiftError where training would.
    """
    if not any(folder.glob(WEIGHTS)):
        return head_of(model) if new_head else []
    stored = Stored(folder, model)
    return require_whole(model, Lack.of_files(model, stored), stored, folder, new_head)


def memory_of(
    outline: Outline, device: torch.device, console: Console, devices: int = 1
) -> dict[str, Any]:
    """Bytes at the peak by part: of a step with the largest batch, and of the passes before and
    after training. On a CPU each of several processes looks at whole calibration batches."""
    recipe, task = outline.recipe, outline.task_on(device)
    batch = outline.rows.largest(recipe, task, devices if device.type == "cuda" else 1)
    methods = memory_of_methods(outline, batch, device, console)
    checkpointing = outline.recompute is True
    return {
        "batch": {"rows": batch.rows, "tokens": batch.tokens},
        "memory_bytes": methods["sift, checkpointing" if checkpointing else "sift"],
        "memory_of_methods": methods,
        "memory_of_passes": memory_of_passes(outline, batch, device, console),
    }


def memory_of_methods(
    outline: Outline, batch: Batch, device: torch.device, console: Console
) -> dict[str, dict[str, Any]]:
    """Bytes of a step of the recipe, LoRA and full training, each also with full checkpointing.

    `missing` in place of the bytes says why a method cannot be counted.
    """
    recipe, build, dense = outline.recipe, outline.build, outline.dense
    chosen, gpu = recipe.selection, device.type == "cuda"
    bf16 = autocasts(recipe.model, recipe.train, device)
    structure, block = chosen.structure or "entry", chosen.block_size or 1
    settings = recipe.train
    centred = settings.decay_toward == "base" and settings.weight_decay > 0
    beside = (settings.step_scale != "none") + centred  # numbers of each entry

    def lora() -> Any:
        layers = adapted_layers(outline.model, list(outline.counts))
        rank, _ = rank_for(outline.model, layers, outline.entries)
        return adapt(build(), "lora", layers, dense, rank).get_base_model()

    prepare = {
        "sift": (build, sparse(outline.counts, dense, structure, block, gpu, beside)),
        "lora": (lora, ordinary),
        "full": (lambda: adapt(build(), "full", [], dense), ordinary),
    }
    methods: dict[str, dict[str, Any]] = {}
    for method, (make, ready) in prepare.items():
        own = outline.recompute
        for checkpointing in (False if own is True else own, True):
            key = f"{method}, checkpointing" if checkpointing is True else method
            with console.status(f"counting the memory of {key}"):
                try:
                    parts = PeakMemory(make, batch, checkpointing, bf16, gpu).step(ready)
                except SiftError as error:  # no PEFT, or nothing that it adapts
                    methods[key] = {"missing": str(error)}
                    continue
            if outline.in_rows:
                parts = outline.in_rows.hold_of(method, parts, outline.model, outline.trained)
            moved = HOST_IF_OFFLOADED if method == "sift" and recipe.train.offload_optimizer else ()
            methods[key] = with_peak(parts, device, moved)
    return methods


def memory_of_passes(
    outline: Outline, batch: Batch, device: torch.device, console: Console
) -> dict[str, dict[str, int]]:
    """Bytes of the pass that ranks gradients of `batch`, where there is one, and of evaluation."""
    recipe, build = outline.recipe, outline.build
    chosen, gpu = recipe.selection, device.type == "cuda"
    bf16 = autocasts(recipe.model, recipe.train, device)
    passes = {}
    with console.status("counting the memory of selection and evaluation"):
        score = find_score(chosen.score or "gradient", allow_code=True)
        if score.needs_data:
            ranking = PeakMemory(build, batch, outline.recompute, bf16, gpu)
            parts = ranking.selection(
                outline.parts.sparse,
                chosen.batches,
                squares="gradient_squares" in score.needs,
                descends=score.descends,
            )
            if outline.in_rows:  # FSDP2 sums the gradients of a block beside those of the next
                parts = outline.in_rows.hold(parts, 2 * outline.in_rows.block)
            passes["selection"] = with_peak(parts, device)
        probed = outline.rows.train if outline.head_start == "probe" else None
        also = [] if probed is None else [probed]  # in batches like those of evaluation
        shape = outline.rows.widest(recipe, batch.task, also)
        parts = PeakMemory(build, shape, bf16=bf16, gpu=gpu).evaluation()
        if outline.in_rows:
            parts = outline.in_rows.hold(parts)
        passes["evaluation"] = with_peak(parts, device)
    return passes


def with_peak(
    parts: dict[str, int], device: torch.device, moved: Sequence[str] = ()
) -> dict[str, int]:
    """The parts that lie on the device, and their sum as `peak`; `moved` lie on the host."""
    if device.type != "cpu":
        host = ("base_values", *moved)
        parts = {name: nbytes for name, nbytes in parts.items() if name not in host}
    return {**parts, "peak": sum(parts.values())}


def fits(result: Mapping[str, Any], device: torch.device, memory: int | None) -> dict[str, Any]:
    """Whether the largest of the passes in `result` fits into the memory of the device.

    `memory` stands in for that of the device.
    """
    needs = {"training": result["memory_bytes"]["peak"]} | {
        name: parts["peak"] for name, parts in result["memory_of_passes"].items()
    }
    worst = max(needs, key=lambda name: needs[name])
    available = memory or device_memory(device)
    return {
        "name": str(device),
        "memory_bytes": available,
        "needs_bytes": needs[worst],
        "needed_by": worst,
        "fits": None if available is None else needs[worst] <= available,
    }


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of the device; those of the host for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measured(
    recipe: Recipe, device: torch.device, allow_code: bool, console: Console
) -> dict[str, Any]:
    """The time until entries are chosen, of three steps, and of an epoch and all steps by tokens.

    `run_s` has that of the trials of learning rates as well, but no evaluation.
    """
    session = open_session(recipe.without_code(), device=str(device))
    assert session.train is not None
    lengths = session.train.lengths
    batches = steps_of(recipe.train, lengths, session.task.packs)
    method = selecting(at_usual_rate(recipe), allow_code, console)(session, batches)
    prepare_model(session.model, session.device, recipe.train.gradient_checkpointing)
    begun = perf_counter()
    optimizer = method.begin()
    begin_s = perf_counter() - begun
    watch, limit = Watch(session), recipe.train.max_grad_norm
    timing, tokens = Timing(), []
    for step, rows in enumerate(islice(batches.endless(), STEPS + 1), start=1):
        with timing.step(session.device):
            if method.due(step):
                method.change(step, optimizer)
            take_step(session, optimizer, step, rows, watch.broken, max_grad_norm=limit)
        tokens.append(computed(rows, lengths, session.task.packs))
    times = timing.step_ms[1:]
    per_token = sum(times) / sum(tokens[1:])
    epoch = islice(batches.endless(), batches.steps_per_epoch)
    all_tokens = sum(computed(rows, lengths, session.task.packs) for rows in epoch)
    epoch_s = per_token * all_tokens / 1e3
    passes = Passes.of(recipe, rule_of(recipe.selection, allow_code), batches.steps)
    return {
        "begin_s": begin_s,
        "steps": len(times),
        "step_time_ms": median(times),
        "epoch_s": epoch_s,
        "run_s": passes.seconds(begin_s, epoch_s / batches.steps_per_epoch),
        "tokens_per_second": 1e3 / per_token,
    }
