"""Base + delta(s) as an ordinary Hugging Face folder, one tensor in memory at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from sift_cli.convert.changes import Composed, Composition, Exact
from sift_cli.convert.compose import Mix
from sift_cli.convert.inputs import Inputs, open_inputs, weight_of_each
from sift_cli.convert.layout import Group, Layout, Shard, lay_out, require_space
from sift_cli.convert.proof import (
    Proof,
    WrittenTensor,
    prove_files,
    prove_logits,
    prove_metrics,
    reloaded_logits,
    score,
)
from sift_cli.convert.undo import (
    COMPOSED_FILE,
    MergeRecord,
    copy_side_files,
    keep_padding,
    save_dropped,
)
from sift_cli.delta.header import Header
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import fingerprint
from sift_cli.models.loading import (
    DTYPES,
    load_tokenizer,
    quiet,
    settle_padding,
    skeleton,
)
from sift_cli.models.shards import INDEX_FILE, write_index
from sift_cli.models.stored import stored_kinds
from sift_cli.models.tensors import header_text, write_file
from sift_cli.recipe import parse_recipe
from sift_cli.runs.cards import model_card
from sift_cli.runs.folder import CARD_FILE, RECIPE_FILE, delta_file
from sift_cli.system.files import new_folder
from sift_cli.tasks.metrics import Metrics

PathOf = str | PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge wrote, and what shows that it is right.

    `tensors` and `changed` count tensors. `dropped` names the base's tensors that the model has
    not, `lost` those that no undo gives back, `rounded` those that an undo gives back in another
    dtype than the base's own.
    """

    out: str
    base: str
    tensors: int
    changed: int
    bytes: int
    dropped: list[str]
    lost: list[str]
    rounded: list[str]
    proof: Proof
    composition: Composition | None

    def to_json(self) -> dict[str, Any]:
        """What `sift merge --json` prints; what was not asked for has no key."""
        parts = self.composition.to_json() if self.composition is not None else {}
        values = vars(self) | self.proof.to_json() | parts
        return {key: one for key, one in values.items() if key not in ("proof", "composition")}


def merge(
    deltas: PathOf | Sequence[PathOf],
    out: PathOf,
    *,
    base: PathOf | None = None,
    weights: Sequence[float] = (),
    rule: str = "sum",
    scale: float = 1.0,
    keep: float | None = None,
    seed: int = 0,
    head: PathOf | None = None,
    undo: bool = False,
    verify: bool = True,
    evaluate: bool = False,
) -> Merged:
    """Writes the trained model (with `undo`, the base again) as a folder: `sift merge`.

    `deltas` are files or run folders, one or several. Says what it verified.

    `base` is the folder to start from: the delta's own base unless given; for `undo` the merged
    one. Several deltas, or a `scale` or `weights` other than 1, are composed by `rule` (see
    `compose.RULES`, with `keep` and `seed`), and the delta at `head` gives its head, unscaled.

    `verify` reads every tensor back from disk and compares its fingerprint, then loads the folder
    through transformers and compares its logits with those of the model as it was trained;
    `evaluate` also scores it on the recipe's data. Nothing is left in `out` unless all succeeds.
    Memory stays near the largest tensor, the deltas and what is imported.

    Raises SiftError: exit code 2 where `out` holds something, the disk is too full, the base cannot
    be found or the deltas do not go together, 3 for a damaged delta or a wrong base, 5 where what
    was written differs.
    """
    given = [deltas] if isinstance(deltas, str | PathLike) else deltas
    paths, out = [delta_file(fspath(path)) for path in given], Path(out)
    source = None if base is None else fspath(base)
    mix = Mix(weight_of_each(weights, paths), rule, scale, keep, seed)
    _check_options(out, mix, source, undo, evaluate)
    inputs = open_inputs(paths, None if head is None else Path(head), source, undo)
    config = _config(inputs)
    layout = _plan(inputs, config, out)
    change = Exact(inputs.delta, undo) if mix.exact else Composed(inputs.deltas, inputs.owner, mix)
    with new_folder(out) as folder:
        written = _write_weights(folder, layout, change, inputs)
        lost = _write_other_files(folder, layout, config, inputs)
        proof = _prove(folder, written, change, verify, evaluate)
        composition = _save_composition(folder, change, inputs, proof.logits)
    return Merged(
        out=str(out),
        base=inputs.source,
        tensors=len(written),
        changed=len(change.changed),
        bytes=layout.bytes,
        dropped=list(layout.dropped),
        lost=lost,
        rounded=layout.rounded,
        proof=proof,
        composition=composition,
    )


def _check_options(out: Path, mix: Mix, base: str | None, undo: bool, evaluate: bool) -> None:
    if undo and not mix.exact:
        raise SiftError(
            "--undo takes one delta, whole; of a composed merge, the one in its folder: "
            f"{COMPOSED_FILE}"
        )
    if undo and base is None:
        raise SiftError("--undo needs --base: the merged folder to turn back")
    if evaluate and undo:
        raise SiftError("--evaluate scores a merged model; --undo gives the base back")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SiftError(f"{out} exists already; choose another --out or remove it")


def _config(inputs: Inputs) -> PretrainedConfig:
    """The configuration of the model that is written."""
    header = inputs.delta.header
    if inputs.undo:
        config = AutoConfig.from_pretrained(inputs.folder, trust_remote_code=False)
        config.architectures = header.base.architectures
        if inputs.delta.dense:  # the head was new, and what it is for with it
            inputs.task.unconfigure(config)
    else:
        config = inputs.task.configure(inputs.folder)
        if header.architecture is not None:
            config.architectures = [header.architecture]
        settle_padding(config, load_tokenizer(inputs.folder))
    config.dtype = DTYPES[header.base.dtype]
    return config  # type: ignore[no-any-return]


def _plan(inputs: Inputs, config: PretrainedConfig, out: Path) -> Layout:
    """What will be written; SiftError where the model lacks a tensor, or the disk room."""
    model = skeleton(config, inputs.task.auto)
    folder, delta = inputs.folder, inputs.delta
    layout = lay_out(folder, model, delta, inputs.source, undo=inputs.undo, record=inputs.record)
    require_space(layout, out, folder)
    return layout


def _write_weights(
    out: Path, layout: Layout, change: Exact | Composed, inputs: Inputs
) -> dict[str, WrittenTensor]:
    """Streams every planned tensor into `out`, changed where need be; what was written, by key."""
    written: dict[str, WrittenTensor] = {}
    parts: dict[int, dict[str, Tensor]] = {}  # of groups, until each is written

    def part(group: Group, key: str) -> Tensor:
        if id(group) not in parts:
            named = {n: change.apply(n, tensor)[0] for n, tensor in group.read().items()}
            parts[id(group)] = group.joined.store(named)
        return parts[id(group)].pop(key)

    def tensors(shard: Shard) -> Iterator[Tensor]:
        for key, planned in shard.tensors.items():
            if planned.group is not None:
                tensor = part(planned.group, planned.key)
                written[key] = WrittenTensor(fingerprint(tensor), planned.held)
                yield tensor.to(planned.written)
                continue
            tensor = planned.read()
            if planned.place is None or not planned.name:
                mark = fingerprint(tensor)
            else:
                tensor, mark = change.apply(planned.name, tensor)
            written[key] = WrittenTensor(mark, planned.held)
            yield tensor.to(planned.written)

    for shard in layout.shards:
        rows = [(key, planned.written, planned.shape) for key, planned in shard.tensors.items()]
        header = shard.header or header_text(rows, shard.metadata)
        write_file(out / shard.file, header, tensors(shard))
    for name, planned in layout.replaced.items():
        change.replace(name, planned.read())
    _check_source(change, inputs)
    damaged = [key for key, mark in layout.aside.items() if written[key].fingerprint != mark]
    if damaged:
        raise SiftError(
            f"{inputs.source}: damaged: {damaged[0]}, aside in sift/", ExitCode.WRONG_FILE
        )
    if layout.indexed:
        write_index(out, layout.sizes)
    return written


def _check_source(change: Exact | Composed, inputs: Inputs) -> None:
    """Raises SiftError (exit code 3) where a tensor that passed was not that of the right model."""
    try:
        change.check(inputs.source, stored_kinds(inputs.folder))
    except SiftError as error:
        composed = inputs.folder / COMPOSED_FILE
        if not inputs.undo or not composed.is_file():
            raise
        raise SiftError(
            f"{error}\nSeveral deltas, or a scaled one, are in {inputs.source}; the one that turns "
            f"it back is {composed}",
            error.code,
        ) from None


def _write_other_files(
    out: Path, layout: Layout, config: PretrainedConfig, inputs: Inputs
) -> list[str]:
    """Writes configuration, tokenizer and the like: in an undo, the base's own where recorded.

    Returns the base's tensors that this undo does not give back, or that one of the merge cannot.
    """
    record = inputs.record
    copy_side_files(inputs.folder, out)
    if record is not None:
        lost = [key for key in record.dropped if key not in layout.aside]
        # without them, or in another dtype, the index is a new one
        record.restore_texts(out, [INDEX_FILE] if lost or layout.rounded else [])
        return lost
    with quiet():
        config.save_pretrained(out)
    if inputs.undo:
        return []
    keep_padding(inputs.folder, out)
    for name, text in inputs.task.side_texts(out).items():
        (out / name).write_text(text, encoding="utf-8")
    # last of all: the record compares the texts that are in `out` with the base's
    return _write_record(out, layout, inputs)


def _write_record(out: Path, layout: Layout, inputs: Inputs) -> list[str]:
    """Writes what undo needs, recipe and card; returns the base's tensors that are not kept."""
    marks = save_dropped(out, layout.dropped, layout.most_aside)
    MergeRecord.of(inputs.folder, out, layout.listings, layout.names, marks).save(out)
    header = inputs.delta.header
    if recipe := _recipe_text(header):
        (out / RECIPE_FILE).write_text(recipe, encoding="utf-8")
        (out / CARD_FILE).write_text(model_card(header), encoding="utf-8")
    return [key for key, mark in marks.items() if not mark]


def _recipe_text(header: Header) -> str | None:
    if not header.recipe:
        return None
    return str(yaml.safe_dump(header.recipe, sort_keys=False, allow_unicode=True))


def _prove(
    folder: Path,
    written: dict[str, WrittenTensor],
    change: Exact | Composed,
    verify: bool,
    evaluate: bool,
) -> Proof:
    """Compares files, logits and metrics as far as was asked; SiftError where they differ.

    Of an undo only the files are compared: the delta does not know the base's logits.
    """
    verified = []
    logits = difference = metrics = trained = None
    if verify:
        prove_files(folder, written)
        verified.append("files")
        if not change.undo:
            logits = reloaded_logits(folder)
            difference = _compare_logits(logits, change)
            if difference is not None:
                verified.append("logits")
    if evaluate:
        metrics, trained = _evaluate(folder, change)
        if trained is not None:
            verified.append("metrics")
    return Proof(verified, logits, difference, metrics, trained)


def _compare_logits(logits: Tensor, change: Exact | Composed) -> float | None:
    """How far the logits are from the trained model's; None where the delta has none for this mix.

    Raises SiftError where they differ (exit code 5), or are not finite (4).
    """
    header = change.delta.header
    if isinstance(change, Exact) and header.logits:
        return prove_logits(logits, torch.tensor(header.logits), header.base.dtype)
    if not bool(logits.isfinite().all()):
        raise SiftError(
            "the merged model's logits are not finite; take a smaller --scale", ExitCode.NOT_FINITE
        )
    return None


def _evaluate(folder: Path, change: Exact | Composed) -> tuple[Metrics, Metrics | None]:
    """What the folder scores, and what it must score: the metrics after training.

    The latter is None for a composition, which may score anything.
    """
    header = change.delta.header
    recipe = _recipe_text(header)
    if recipe is None:
        raise SiftError("--evaluate: the delta carries no recipe, so there is no data to score on")
    metrics = score(folder, parse_recipe(recipe, "the delta's recipe"))
    if not isinstance(change, Exact):
        return metrics, None
    prove_metrics(metrics, header.metrics)
    return metrics, header.metrics


def _save_composition(
    folder: Path, change: Exact | Composed, inputs: Inputs, logits: Tensor | None
) -> Composition | None:
    """Saves what was composed as one delta in the folder, for undo; None where nothing was."""
    if not isinstance(change, Composed):
        return None
    change.save(folder / COMPOSED_FILE, logits)
    return change.describe(str(inputs.paths[inputs.owner]) if inputs.delta.dense else None)
