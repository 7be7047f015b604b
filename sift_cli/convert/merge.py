"""Base + delta(s) as an ordinary Hugging Face folder, one tensor in memory at a time."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from sift_cli.convert.changes import Composed, Toggle
from sift_cli.convert.compose import Mix
from sift_cli.convert.plan import Plan, Shard, add_dense, plan_merge, plan_undo, require_whole
from sift_cli.convert.proof import prove_files, prove_logits, prove_metrics, reloaded_logits, score
from sift_cli.convert.undo import (
    RECORD_FILE,
    Record,
    copy_side_files,
    keep_padding,
    read_record,
    save_dropped,
    side_files,
)
from sift_cli.delta.file import Delta, WeightDelta, load_delta
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import fingerprint
from sift_cli.models.loading import DTYPES, INDEX_FILE, load_tokenizer, model_folder, quiet
from sift_cli.models.names import tensor_names
from sift_cli.models.stored import stored_kinds
from sift_cli.models.tensors import header_text, write_file, write_index
from sift_cli.recipe import parse_recipe
from sift_cli.runs.cards import model_card
from sift_cli.runs.folder import CARD_FILE, RECIPE_FILE, delta_file
from sift_cli.system.files import new_folder
from sift_cli.tasks.classification import task_of_labels
from sift_cli.tasks.task import Task

COMPOSED_FILE = "composed.safetensors"
ASIDE = 0.05  # tensors that the model has not are kept for undo up to this share of its size
SPARE = 1 << 24  # bytes for configuration and tokenizer


def merge(
    deltas: Path | Sequence[Path],
    out: Path,
    *,
    base: str | None = None,
    weights: Sequence[float] = (),
    rule: str = "sum",
    scale: float = 1.0,
    keep: float | None = None,
    seed: int = 0,
    head: Path | None = None,
    undo: bool = False,
    verify: bool = True,
    evaluate: bool = False,
) -> dict[str, Any]:
    """Writes the trained model (with `undo`, the base again) as a folder; says what it verified.

    `base` is the folder to start from: the delta's own base unless given; for `undo` the merged
    one. Several deltas, or a `scale` or `weights` other than 1, are composed by `rule` (see
    `compose.RULES`, with `keep` and `seed`), and the head comes whole from the delta at `head`.

    `verify` reads every tensor back from disk and compares its fingerprint, then loads the folder
    through transformers and compares its logits with those of the model as it was trained;
    `evaluate` also scores it on the recipe's data. Nothing is left in `out` unless all succeeds.
    Memory stays near the largest tensor, the deltas and what is imported.

    Raises SiftError: exit code 2 where `out` holds something, the disk is too full, the base cannot
    be found or the deltas do not go together, 3 for a damaged delta or a wrong base, 5 where what
    was written differs.
    """
    paths = [delta_file(str(one)) for one in ([deltas] if isinstance(deltas, Path) else deltas)]
    mix = Mix(_weights(weights, paths), rule, scale, keep, seed)
    if undo and not mix.exact:
        raise SiftError(
            "--undo takes one delta, whole; of a composed merge, the one in its folder: "
            f"sift/{COMPOSED_FILE}"
        )
    if undo and base is None:
        raise SiftError("--undo needs --base: the merged folder to turn back")
    if evaluate and undo:
        raise SiftError("--evaluate scores a merged model; --undo gives the base back")
    _require_free(out)
    loaded = [load_delta(path) for path in paths]
    if len(loaded) > 1:
        _check_one_base(paths, loaded)
    owner = _head_owner(paths, loaded, delta_file(str(head)) if head else None)
    delta = loaded[owner]
    about = delta.about["base"]
    source = base or about["path"]
    try:
        folder = model_folder(source, None if base else about["revision"])
    except SiftError as error:
        hint = "" if base else "; give the base with --base"
        raise SiftError(f"{error}{hint}", error.code) from None
    record = read_record(folder) if undo else None
    task = task_of_labels(delta.about["labels"])
    config = _config(folder, task, delta, undo)
    names = tensor_names(config, task.auto)
    plan = plan_undo(folder, names, record) if record else plan_merge(folder, names, delta)
    require_whole(plan, names, delta, source)
    if not undo:
        add_dense(plan, delta)
    _require_space(out, plan, folder)
    change = Toggle(delta, undo) if mix.exact else Composed(loaded, owner, mix)
    report: dict[str, Any] = {"out": str(out), "base": source}
    lost: list[str] = []  # what undo does not give back
    with new_folder(out) as partial:
        wanted = _write_weights(partial, plan, change, source, folder)
        copy_side_files(folder, partial)
        if record:
            lost = [key for key in record.dropped if key not in plan.aside]
            # without them, or in another dtype, the index is a new one
            record.restore_texts(partial, [INDEX_FILE] if lost or plan.rounded else [])
        else:
            with quiet():
                config.save_pretrained(partial)
            if not undo:
                keep_padding(folder, partial)
        if not undo:
            marks = save_dropped(partial, plan.dropped, int(ASIDE * plan.bytes))
            lost = [key for key, mark in marks.items() if not mark]
            Record.of(folder, partial, plan.listings, plan.names, marks).save(partial)
            if recipe := _recipe(delta):
                (partial / RECIPE_FILE).write_text(recipe, encoding="utf-8")
                (partial / CARD_FILE).write_text(model_card(delta.about), encoding="utf-8")
        report |= {
            "tensors": len(wanted),
            "changed": len(change.changed),
            "bytes": plan.bytes,
            "dropped": list(plan.dropped),
            "lost": lost,
            "rounded": plan.rounded,
            "verified": [],
        }
        logits = _verify(partial, wanted, change, report) if verify else None
        if evaluate:
            _evaluate(partial, change, report)
        if isinstance(change, Composed):
            report |= change.describe() | {"head": str(paths[owner]) if delta.dense else None}
            change.save((partial / RECORD_FILE).with_name(COMPOSED_FILE), logits)
    return report


def _write_weights(
    out: Path, plan: Plan, change: Toggle | Composed, source: str, folder: Path
) -> dict[str, tuple[str, torch.dtype]]:
    """Streams every planned tensor into `out`, changed where need be.

    Returns the fingerprint of each as written, and the dtype that it holds for.
    """
    wanted: dict[str, tuple[str, torch.dtype]] = {}

    def tensors(shard: Shard) -> Iterator[Tensor]:
        for key, one in shard.tensors.items():
            tensor = one.read()
            if one.place is None or not one.name:
                mark = fingerprint(tensor)
            else:
                tensor, mark = change.apply(one.name, tensor)
            wanted[key] = mark, one.held
            yield tensor.to(one.written)

    for shard in plan.shards:
        rows = [(key, one.written, one.shape) for key, one in shard.tensors.items()]
        header = shard.header or header_text(rows, shard.metadata)
        write_file(out / shard.file, header, tensors(shard))
    for name, one in plan.replaced.items():
        change.replace(name, one.read())
    change.check(source, stored_kinds(folder))
    damaged = [key for key, mark in plan.aside.items() if wanted[key][0] != mark]
    if damaged:
        raise SiftError(f"{source}: damaged: {damaged[0]}, aside in sift/", ExitCode.WRONG_FILE)
    if plan.indexed:
        sizes = {
            k: (shard.file, t.bytes) for shard in plan.shards for k, t in shard.tensors.items()
        }
        write_index(out, sizes)
    return wanted


def _verify(
    folder: Path,
    wanted: Mapping[str, tuple[str, torch.dtype]],
    change: Toggle | Composed,
    report: dict[str, Any],
) -> Tensor | None:
    """Proves the files, and of a merge the logits, which it returns; says so in `report`."""
    prove_files(folder, wanted)
    report["verified"].append("files")
    if isinstance(change, Toggle) and change.undo:
        return None
    logits = reloaded_logits(folder)
    if isinstance(change, Toggle) and change.delta.about.get("logits"):
        about = change.delta.about
        trained = torch.tensor(about["logits"])
        report["logits_difference"] = prove_logits(logits, trained, about["base"]["dtype"])
        report["verified"].append("logits")
    elif not bool(logits.isfinite().all()):
        raise SiftError(
            "the merged model's logits are not finite; take a smaller --scale", ExitCode.NOT_FINITE
        )
    return logits


def _evaluate(folder: Path, change: Toggle | Composed, report: dict[str, Any]) -> None:
    """Scores the folder; one delta, whole, must score what it did after training."""
    whole = isinstance(change, Toggle)
    delta = change.delta if isinstance(change, Toggle) else change.deltas[change.owner]
    recipe = _recipe(delta)
    if recipe is None:
        raise SiftError("--evaluate: the delta carries no recipe, so there is no data to score on")
    report["metrics"] = score(folder, parse_recipe(recipe, "the delta's recipe"))
    report["metrics_trained"] = delta.about["metrics"] if whole else None
    if whole:
        prove_metrics(report["metrics"], delta.about["metrics"])
        report["verified"].append("metrics")


def _weights(weights: Sequence[float], paths: Sequence[Path]) -> tuple[float, ...]:
    if weights and len(weights) != len(paths):
        raise SiftError(f"{len(paths)} deltas, but {len(weights)} --weight; give one for each")
    return tuple(weights) or (1.0,) * len(paths)


def _require_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SiftError(f"{out} exists already; choose another --out or remove it")


def _check_one_base(paths: Sequence[Path], loaded: Sequence[Delta]) -> None:
    """Raises SiftError where two deltas disagree on a weight that both change."""
    seen: dict[str, tuple[int, WeightDelta]] = {}
    for at, delta in enumerate(loaded):
        for name, weight in delta.weights.items():
            first, other = seen.setdefault(name, (at, weight))
            if (other.base, other.dtype, other.shape) != (weight.base, weight.dtype, weight.shape):
                bases = [loaded[one].about["base"] for one in (first, at)]
                said = " and ".join(f"{one['path']} ({one['dtype']})" for one in bases)
                raise SiftError(
                    f"{paths[first]} and {paths[at]} are of different bases: {said} differ in "
                    f"{name}",
                    ExitCode.WRONG_FILE,
                )


def _head_owner(paths: Sequence[Path], loaded: Sequence[Delta], head: Path | None) -> int:
    """Which delta the head and the labels come from."""
    if head is not None:
        if head not in paths:
            raise SiftError(f"--head {head} is none of the deltas to merge")
        return paths.index(head)
    owners = [at for at, delta in enumerate(loaded) if delta.dense] or list(range(len(loaded)))
    first = loaded[owners[0]]
    for at in owners[1:]:
        other = loaded[at]
        same = other.about["labels"] == first.about["labels"]
        same = same and other.dense.keys() == first.dense.keys()
        if not same or any(not torch.equal(one, first.dense[n]) for n, one in other.dense.items()):
            raise SiftError(
                f"{paths[owners[0]]} (labels {first.about['labels']}) and {paths[at]} (labels "
                f"{other.about['labels']}) each have a head of their own, and heads do not add; "
                "name the delta whose head the merged model gets with --head"
            )
    return owners[0]


def _require_space(out: Path, plan: Plan, folder: Path) -> None:
    needed = (
        int((1 + ASIDE * bool(plan.dropped)) * plan.bytes)
        + sum((folder / name).stat().st_size for name in side_files(folder))
        + SPARE
    )
    there = next(place for place in out.absolute().parents if place.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise SiftError(
            f"{out} needs {needed / 1e9:.2f} GB, and {there} has {free / 1e9:.2f} GB free; make "
            "room or choose another --out"
        )


def _config(folder: Path, task: Task, delta: Delta, undo: bool) -> PretrainedConfig:
    about = delta.about["base"]
    if undo:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.architectures = about["architectures"]
        if delta.dense:  # the head was new, and what it is for with it
            task.unconfigure(config)
    else:
        config = task.configure(folder)
        config.architectures = [delta.about["architecture"]]
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = load_tokenizer(folder).pad_token_id
    config.dtype = DTYPES[about["dtype"]]
    return config  # type: ignore[no-any-return]


def _recipe(delta: Delta) -> str | None:
    if not delta.about.get("recipe"):
        return None
    return str(yaml.safe_dump(delta.about["recipe"], sort_keys=False, allow_unicode=True))
