"""A delta from two dense models: whole, or the largest changes within a density."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from sift_cli.delta.build import describe_base, versions
from sift_cli.delta.file import SIGNED, Delta, WeightDelta, save_delta, weight_delta
from sift_cli.delta.identity import rest_fingerprints
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import state_fingerprints
from sift_cli.models.loading import (
    DTYPES,
    UNLOADABLE,
    LoadedModel,
    load_model,
    load_tokenizer,
    model_folder,
)
from sift_cli.models.names import all_names
from sift_cli.models.stored import Stored, stored_kinds
from sift_cli.recipe import parse_recipe
from sift_cli.runs.folder import RECIPE_FILE
from sift_cli.selection.budget import Global, PerWeight, share
from sift_cli.sparse import Support
from sift_cli.tasks.classification import task_of_tuned
from sift_cli.tasks.evaluation import probe
from sift_cli.tasks.task import Task

SCOPES = ("tensor", "global")
LISTED = 10  # names in a message
# What a configuration may say differently without the model computing anything else.
IDLE = {"architectures", "id2label", "label2id", "problem_type", "transformers_version", "dtype"}


def difference(
    base: str,
    tuned: str,
    out: Path,
    *,
    density: float | None = None,
    scope: str = "tensor",
    dtype: str | None = None,
) -> dict[str, Any]:
    """Writes the delta that turns the model `base` into `tuned`; returns what it holds.

    Without `density` it holds every changed entry. With one, it holds the entries whose value
    changed most: that share of each weight (`scope` tensor, as in training), or of all weights
    together (global). Tensors that the base lacks are stored whole. `dtype` is the one that both
    models are held in, if not the one that both are stored in. The base is in memory once, `tuned`
    one tensor at a time.

    Raises SiftError: exit code 2 for models that no delta can join, 3 for damaged files, 4 for a
    number that is not finite.
    """
    _check_options(out, density, scope, dtype)
    task, pair, about, notes = _open(base, tuned, dtype)
    model, named = pair.loaded.model, pair.base
    marks = state_fingerprints(model, pair.new)
    weights, sizes = _apply(pair, _choose(pair, density, scope), marks)
    dense = {name: named[name].detach().clone() for name in pair.new}
    if not weights and not dense:
        raise SiftError(f"{tuned} equals {base}: there is no difference to hold")
    about["difference"] = {
        "tuned": tuned,
        "density": density,
        "scope": scope if density is not None else None,
        "exact": sizes.kept == sizes.changed and pair.lossless,
        "changed": sizes.changed,
        "norm": sizes.norm,
        "norm_share": sizes.norm_share,
    }
    about["logits"] = probe(task, model, model.config).tolist()
    out.parent.mkdir(parents=True, exist_ok=True)
    digest = save_delta(out, Delta(weights, dense, rest_fingerprints(marks, weights), about))
    return {
        "out": str(out),
        "base": base,
        **about["difference"],
        "dtype": about["base"]["dtype"],
        "kept": sizes.kept,
        "total_entries": sum(one.numel() for one in named.values()),
        "dense_entries": sum(one.numel() for one in dense.values()),
        "dense": sorted(dense),
        "delta_bytes": out.stat().st_size,
        "delta_sha256": digest,
        "notes": notes,
    }


def _check_options(out: Path, density: float | None, scope: str, dtype: str | None) -> None:
    if out.exists():
        raise SiftError(f"{out} exists already; choose another --out or remove it")
    if density is not None and not 0 < density <= 1:
        raise SiftError(f"--density {density:g}: a share above 0 and up to 1, such as 0.01")
    if scope not in SCOPES:
        raise SiftError(f"--scope {scope}: use {' or '.join(SCOPES)}")
    if dtype is not None and dtype not in DTYPES:
        raise SiftError(f"--dtype {dtype}: use {' or '.join(DTYPES)}")


def _open(
    base: str, tuned: str, dtype: str | None
) -> tuple[Task, "Pair", dict[str, Any], list[str]]:
    """The task and both models, checked; what the delta says of them, and what it will not hold."""
    folder, tuned_folder = model_folder(base), model_folder(tuned)
    config = _config(tuned_folder)
    task = task_of_tuned(config, tuned)
    held_in = dtype or _common_dtype(base, folder, tuned, tuned_folder)
    base_config = _base_config(folder, task, config, tuned)
    loaded = load_model(folder, task.auto, base_config, DTYPES[held_in])
    architecture = type(loaded.model).__name__
    if architecture not in (config.architectures or []):
        raise SiftError(f"{tuned} is {config.architectures}; the base becomes a {architecture}")
    pair = Pair(loaded, Stored(tuned_folder, all_names(loaded.model)))
    _check_tensors(pair, base, tuned)
    about = {
        "base": describe_base(loaded.model, base, None, held_in),
        "architecture": architecture,
        **_origin(tuned_folder),
        **task.header(),
        "policy": "difference",
        "metrics": {},
        "versions": versions(),
    }
    return task, pair, about, _notes(pair, tuned_folder, config)


def _config(folder: Path) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UNLOADABLE as error:
        raise SiftError(f"{folder}: {str(error).splitlines()[0]}") from error
    return config


def _base_config(
    folder: Path, task: Task, tuned_config: PretrainedConfig, tuned: str
) -> PretrainedConfig:
    config = task.configure(folder)
    if config.model_type != tuned_config.model_type:
        raise SiftError(
            f"{tuned} is of the kind {tuned_config.model_type}, the base {config.model_type}: "
            "only two models of one architecture have a difference"
        )
    return config


def _common_dtype(base: str, folder: Path, tuned: str, tuned_folder: Path) -> str:
    """The dtype that both models are stored in, throughout."""
    one, other = (
        {str(dtype).removeprefix("torch.") for dtype, _ in stored_kinds(place).values()}
        for place in (folder, tuned_folder)
    )
    if one == other and len(one) == 1 and one <= set(DTYPES):
        return one.pop()
    raise SiftError(
        f"{base} is stored in {' and '.join(sorted(one))}, {tuned} in "
        f"{' and '.join(sorted(other))}; name what both are to be held in: --dtype float32 keeps "
        "every value, and what rounding changed with it, --dtype bfloat16 rounds both first"
    )


@dataclass
class Pair:
    """The base in memory and the tuned model on disk, seen one tensor at a time.

    `base` are the base's parameters by name. `lossless` becomes False where a tuned value is
    rounded to the base's dtype.
    """

    loaded: LoadedModel
    tuned: Stored
    lossless: bool = True

    def __post_init__(self) -> None:
        self.base: dict[str, nn.Parameter] = dict(self.loaded.model.named_parameters())

    @property
    def new(self) -> tuple[str, ...]:
        """The parameters that the base lacks."""
        return self.loaded.new

    def __iter__(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, base and tuned values ([...], both in the base's dtype) of each shared weight."""
        for name, weight in self.base.items():
            if name not in self.new:
                yield name, weight.detach(), self.read(name)

    def read(self, name: str) -> Tensor:
        """The tuned tensor in the base's dtype."""
        stored = self.tuned.tensor(name)
        held = stored.to(self.base[name].dtype)
        if held.dtype != stored.dtype and not torch.equal(held.to(stored.dtype), stored):
            self.lossless = False
        if not bool(torch.isfinite(held).all()):
            raise SiftError(f"{name} is not finite in the tuned model", ExitCode.NOT_FINITE)
        return held


def _check_tensors(pair: Pair, base: str, tuned: str) -> None:
    """Raises SiftError where the tuned model's tensors are not those of the base's architecture."""
    places = pair.tuned.places
    names = list(pair.base)
    lacking = [name for name in names if name not in places]
    if lacking:
        raise SiftError(f"{tuned} lacks {_listed(lacking)}")
    shapes = {name: tuple(pair.tuned.shape(name)) for name in names}
    other = [
        f"{name}: {list(pair.base[name].shape)} in the base, {list(shape)} in the tuned model"
        for name, shape in shapes.items()
        if shape != tuple(pair.base[name].shape)
    ]
    if other:
        hint = ""
        if any("embed" in one for one in other):
            hint = "\nA resized vocabulary has no base to differ from."
        raise SiftError(f"{tuned} has other shapes than {base}: {_listed(other)}{hint}")
    state = pair.loaded.model.state_dict()
    moved = [
        name
        for name in places
        if name not in pair.base
        and not torch.equal(pair.tuned.tensor(name).to(state[name].dtype), state[name])
    ]
    if moved:
        raise SiftError(
            f"{tuned} differs in what is no parameter, which no delta holds: {_listed(moved)}"
        )


def _listed(names: Sequence[str]) -> str:
    more = f"\n  and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)}:\n  " + "\n  ".join(names[:LISTED]) + more


def _origin(folder: Path) -> dict[str, Any]:
    """Recipe and task of the tuned model, where the folder says them."""
    path = folder / RECIPE_FILE
    if not path.is_file():
        return {"recipe": None, "task": None}
    recipe = parse_recipe(path.read_text(encoding="utf-8"), str(path))
    return {
        "recipe": recipe.model_dump(mode="json", exclude={"out", "log"}),
        "task": recipe.data.task,
    }


def _notes(pair: Pair, folder: Path, config: PretrainedConfig) -> list[str]:
    """What the tuned model has that base + delta will not have."""
    notes = []
    own, other = pair.loaded.model.config.to_dict(), config.to_dict()
    for key in sorted(own.keys() & other.keys() - IDLE):
        if key.startswith("_") or other[key] is None or own[key] == other[key]:
            continue
        notes.append(f"config.json: {key} is {other[key]}, but {own[key]} in the base, which stays")
    try:
        vocabulary = load_tokenizer(folder).get_vocab()
    except SiftError:
        notes.append("the tuned model has no tokenizer; the base's is taken")
    else:
        if vocabulary != pair.loaded.tokenizer.get_vocab():
            notes.append("the tokenizer has another vocabulary than the base's, which stays")
    if pair.tuned.strange:
        count, first = len(pair.tuned.strange), pair.tuned.strange[0]
        notes.append(f"{count} tensors that the model has no use for are left out, such as {first}")
    return notes


@dataclass
class Sizes:
    """How much changed, and how much of it a delta keeps."""

    changed: int = 0
    kept: int = 0
    square: float = 0.0
    kept_square: float = 0.0

    @property
    def norm(self) -> float:
        """2-norm of the whole change."""
        return sqrt(self.square)

    @property
    def norm_share(self) -> float:
        """The 2-norm of what is kept, as a share of the whole change's."""
        return sqrt(self.kept_square / self.square) if self.square else 1.0


def _differs(one: Tensor, other: Tensor) -> Tensor:
    """Where two weights differ in any bit, so that -0 is not 0; bool, flat."""
    signed = SIGNED[one.element_size()]
    return (one.contiguous().view(signed) != other.contiguous().view(signed)).reshape(-1)


def _choose(pair: Pair, density: float | None, scope: str) -> dict[str, Tensor] | None:
    """The positions of the largest changes in each weight; None where all are kept."""
    if density is None:
        return None
    sizes = {name: weight.numel() for name, weight in pair.base.items() if name not in pair.new}
    selector: Global | PerWeight
    if scope == "global":
        selector = Global(share(density, sum(sizes.values())), sizes)
    else:
        selector = PerWeight({name: share(density, size) for name, size in sizes.items()})
    least = torch.finfo(torch.float32).tiny
    for name, base, tuned in pair:
        scores = (tuned.float() - base.float()).abs_().clamp_(min=least).reshape(-1)
        scores[~_differs(base, tuned)] = 0  # below any change, even one of -0 to 0
        selector.add(name, scores)
    return selector.chosen()


@torch.no_grad()
def _apply(
    pair: Pair, chosen: Mapping[str, Tensor] | None, marks: Mapping[str, str]
) -> tuple[dict[str, WeightDelta], Sizes]:
    """Writes the kept changes into the base's weights, in place; returns them as deltas."""
    weights, sizes = {}, Sizes()
    for name, base, tuned in pair:
        differs = _differs(base, tuned)
        changed = int(differs.sum())
        if not changed:
            continue
        if chosen is None:
            kept = differs.nonzero().flatten()
        else:
            kept = chosen.get(name, torch.empty(0, dtype=torch.int64)).long()
            kept = kept[differs[kept]]
        squares = (tuned.float() - base.float()).square_().reshape(-1)
        sizes.changed += changed
        sizes.kept += len(kept)
        sizes.square += float(squares.sum(dtype=torch.float64))
        sizes.kept_square += float(squares[kept].sum(dtype=torch.float64))
        if len(kept):
            support = Support.of(base.shape, kept)
            before, after = support.gather(base), support.gather(tuned)
            support.scatter_(base, after)
            weights[name] = weight_delta(support, before, after, marks[name], base)
    for name in pair.new:
        pair.base[name].copy_(pair.read(name))
    return weights, sizes
