"""A delta from two dense models: every change, or the largest ones within a density."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sift_cli.convert.pair import Pair, open_pair
from sift_cli.delta.build import describe_base, versions
from sift_cli.delta.file import SIGNED, Delta, WeightDelta, save_delta, weight_delta
from sift_cli.delta.header import Header
from sift_cli.delta.identity import rest_fingerprints
from sift_cli.errors import SiftError
from sift_cli.models.fingerprints import state_fingerprints
from sift_cli.models.loading import (
    DTYPES,
    load_tokenizer,
)
from sift_cli.recipe import Recipe, parse_recipe
from sift_cli.runs.folder import RECIPE_FILE
from sift_cli.runs.language import language_of
from sift_cli.selection.budget import Global, PerWeight, share
from sift_cli.sparse import Support
from sift_cli.tasks.evaluation import probe
from sift_cli.tasks.language import Language, Wording
from sift_cli.tasks.table import LANGUAGE
from sift_cli.tasks.task import Task
from sift_cli.tasks.templates import OWN, choose_template

DIFFERENCE_SCOPES = ("tensor", "global")
# Keys of a configuration that change nothing of what the model computes.
IDLE = {
    "architectures",
    "id2label",
    "label2id",
    "problem_type",
    "transformers_version",
    "dtype",
}


@dataclass(frozen=True)
class Origin:
    """What the delta says of the difference that it holds.

    `changed` counts the entries that differ, `norm` is the 2-norm of all changes, `norm_share` that
    of the kept ones as a share of it. `exact`: base + delta is the tuned model, bit for bit.
    """

    tuned: str
    density: float | None
    scope: str | None
    exact: bool
    changed: int
    norm: float
    norm_share: float


@dataclass(frozen=True)
class Difference:
    """The delta that was written: its origin, and how much it holds.

    `kept` counts entries of the base's tensors, `dense_entries` those of `dense`, the tensors that
    the base lacks. `notes` tell what the tuned model has that the delta does not hold.
    """

    out: str
    base: str
    origin: Origin
    dtype: str
    kept: int
    total_entries: int
    dense_entries: int
    dense: list[str]
    delta_bytes: int
    delta_sha256: str
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """What `sift diff --json` prints, the origin's keys among the others."""
        values = asdict(self)
        first = {"out": values.pop("out"), "base": values.pop("base"), **values.pop("origin")}
        return first | values


def difference(
    base: str,
    tuned: str,
    out: Path,
    *,
    density: float | None = None,
    scope: str = "tensor",
    dtype: str | None = None,
) -> Difference:
    """Writes the delta that turns the model `base` into `tuned`; returns what it holds.

    Without `density` it holds every changed entry. With one, it holds the entries whose value
    changed most: that share of each weight (`scope` tensor, as in training), or of all weights
    together (global). Of tensors that the base lacks it holds all. `dtype` is the one that both
    models are held in, if not the one that both are stored in. The base is in memory once, `tuned`
    one tensor at a time.

    Raises SiftError: exit code 2 for models that no delta can join, 3 for damaged files, 4 for a
    number that is not finite.
    """
    _check_options(out, density, scope, dtype)
    pair = open_pair(base, tuned, dtype)
    header, notes = _header(pair, base), _notes(pair)
    model, named = pair.loaded.model, pair.base
    marks = state_fingerprints(model, pair.new)
    weights, sizes = _apply(pair, _choose(pair, density, scope), marks)
    dense = {name: named[name].detach().clone() for name in pair.new}
    if not weights and not dense:
        raise SiftError(f"{tuned} equals {base}: there is no difference to hold")
    within = scope if density is not None else None
    exact = sizes.kept == sizes.changed and pair.lossless
    origin = Origin(tuned, density, within, exact, sizes.changed, sizes.norm, sizes.norm_share)
    logits = probe(
        pair.task, model, model.config
    ).tolist()  # of base + delta, which is the model now
    header = header.model_copy(update={"difference": asdict(origin), "logits": logits})
    out.parent.mkdir(parents=True, exist_ok=True)
    digest = save_delta(out, Delta(weights, dense, rest_fingerprints(marks, weights), header))
    return Difference(
        out=str(out),
        base=base,
        origin=origin,
        dtype=header.base.dtype,
        kept=sizes.kept,
        total_entries=sum(weight.numel() for weight in named.values()),
        dense_entries=sum(tensor.numel() for tensor in dense.values()),
        dense=sorted(dense),
        delta_bytes=out.stat().st_size,
        delta_sha256=digest,
        notes=notes,
    )


def _check_options(out: Path, density: float | None, scope: str, dtype: str | None) -> None:
    if out.exists():
        raise SiftError(f"{out} exists already; choose another --out or remove it")
    if density is not None and not 0 < density <= 1:
        raise SiftError(f"--density {density:g}: a share above 0 and up to 1, such as 0.01")
    if scope not in DIFFERENCE_SCOPES:
        raise SiftError(f"--scope {scope}: use {' or '.join(DIFFERENCE_SCOPES)}")
    if dtype is not None and dtype not in DTYPES:
        raise SiftError(f"--dtype {dtype}: use {' or '.join(DTYPES)}")


def _header(pair: Pair, base: str) -> Header:
    """What the delta says of itself but for `difference` and `logits`, which its content tells."""
    recipe = _recipe(pair.folder)
    return Header(
        base=describe_base(pair.loaded.model, base, None, pair.dtype),
        architecture=type(pair.loaded.model).__name__,
        recipe=recipe.model_dump(mode="json", exclude={"out", "log"}) if recipe else None,
        task=recipe.data.task if recipe else None,
        **_worded(pair, recipe).header(),
        policy="difference",
        metrics={},
        versions=versions(),
    )


def _worded(pair: Pair, recipe: Recipe | None) -> Task:
    """The tuned model's task; a language model's with its recipe's wording, or its own template."""
    if recipe is not None and recipe.data.task in LANGUAGE:
        return language_of(recipe)
    if not isinstance(pair.task, Language):
        return pair.task
    own = choose_template(OWN, load_tokenizer(pair.folder))
    if own is None or own == choose_template(OWN, pair.loaded.tokenizer):
        return pair.task
    return replace(pair.task, wording=Wording(template=own.text))


def _recipe(folder: Path) -> Recipe | None:
    """The recipe of the tuned model, where the folder holds one."""
    path = folder / RECIPE_FILE
    return parse_recipe(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else None


def _notes(pair: Pair) -> list[str]:
    """What the tuned model has that base + delta will not have."""
    notes = []
    own, other = pair.loaded.model.config.to_dict(), pair.config.to_dict()
    for key in sorted(own.keys() & other.keys() - IDLE):
        if key.startswith("_") or other[key] is None or own[key] == other[key]:
            continue
        notes.append(f"config.json: {key} is {other[key]}, but {own[key]} in the base, which stays")
    try:
        vocabulary = load_tokenizer(pair.folder).get_vocab()
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
