"""Why a model is not the base of a delta, in words that say what to do about it."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod

import torch

from sift_cli.delta.file import Delta
from sift_cli.errors import ExitCode, SiftError, counted, in_lines
from sift_cli.models.fingerprints import TensorKind, holds

NOT_TRAINED = "not the trained weight"  # in place of a fingerprint
VOCABULARY = re.compile(r"(^|\.)(word_embeddings|embed_tokens|wte|shared|lm_head)\.weight$")


def differing(delta: Delta, marks: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Names of the changed weights that `marks` lacks, and of its tensors that are not the base's.

    `marks` holds the fingerprint of each tensor of a model. Where it has another set of tensors
    than the base, those are named whose fingerprints the base has nowhere; both lists are empty
    only for the base itself.
    """
    lacking = [name for name in delta.weights if name not in marks]
    wrong = [n for n, one in delta.weights.items() if n in marks and marks[n] != one.base]
    others = sorted(set(marks) - set(delta.weights))
    rest = [delta.rest[at : at + 8] for at in range(0, len(delta.rest), 8)]
    if len(others) == len(rest) and not lacking:
        pairs = zip(others, rest, strict=True)
        return [], sorted(wrong + [name for name, mark in pairs if marks[name][:8] != mark])
    unknown, left = [], Counter(rest)
    for name in others:
        left[marks[name][:8]] -= 1
        if left[marks[name][:8]] < 0:
            unknown.append(name)
    if not lacking and not unknown:  # it has fewer, and the delta does not say how they are called
        unknown = [f"another set of tensors: {len(others)} more than the changed, not {len(rest)}"]
    return lacking, sorted(wrong + unknown)


def advice(
    delta: Delta,
    marks: Mapping[str, str],
    kinds: Mapping[str, TensorKind],
    tied: Mapping[str, str],
    wrong: Sequence[str],
    merged: bool = False,
) -> str:
    """What may be the matter with a model in which the tensors `wrong` are not the base's.

    `kinds` and `tied` are those of the model as far as they are known.
    """
    lacking = [name for name in delta.weights if name not in marks]
    base = delta.header.base
    wide = {name: kind for name in wrong if (kind := _kind(name, kinds))}
    return (
        _tied(delta, marks, tied)
        or renamed(delta, marks, lacking)
        or _resized(delta, wide)
        or _in_another_dtype(delta, wide)
        or _changed_already(delta, marks, merged)
        or _right_one(base.revision, merged)
    )


def _right_one(revision: str | None, merged: bool) -> str:
    if merged:
        return "Give the model that has this delta on it, or the delta that this model has on it."
    return f"Give the model that it was trained on{_revision(revision)}."


def _revision(revision: str | None) -> str:
    return f", revision {revision}" if revision else ""


def _kind(name: str, kinds: Mapping[str, TensorKind]) -> TensorKind | None:
    """Of a tensor whose name in a file may lack the model's first word."""
    return kinds.get(name) or kinds.get(name.partition(".")[2])


def _tied(delta: Delta, marks: Mapping[str, str], tied: Mapping[str, str]) -> str:
    """A sentence where tensors are tied here and not in the base, or the other way, or ""."""
    before = delta.header.base.tied
    for name, owner in before.items():
        if name in marks or (owner not in marks and owner in delta.weights):
            return (
                f"{name} is tied to {owner} in the base, and not here: "
                "set tie_word_embeddings in config.json to true."
            )
    for name, owner in tied.items():
        if name not in before:
            return (
                f"{name} is tied to {owner} here, and a tensor of its own in the base: "
                "set tie_word_embeddings in config.json to false."
            )
    return ""


def renamed(delta: Delta, marks: Mapping[str, str], lacking: Collection[str]) -> str:
    """A sentence on changed weights that are `lacking` and are here under other names, or ""."""
    names = {mark: name for name, mark in marks.items()}
    others = {n: names[delta.weights[n].base] for n in lacking if delta.weights[n].base in names}
    if not others:
        return ""
    old, new = max(others.items(), key=lambda pair: prod(delta.weights[pair[0]].shape))
    version = delta.header.versions.get("transformers")
    hint = f"; the delta was made with transformers {version}" if version else ""
    return (
        f"{len(others)} of {len(lacking)} weights that are lacking are here under other names, "
        f"such as {new} for {old}: rename them back{hint}."
    )


def _resized(delta: Delta, wrong: Mapping[str, TensorKind]) -> str:
    """A sentence where the vocabulary has other rows than the base's, or ""."""
    for name, (_, shape) in wrong.items():
        rows = delta.header.base.vocabulary
        if name in delta.weights:
            before = delta.weights[name].shape
            rows = before[0] if before[1:] == shape[1:] else None
        if VOCABULARY.search(name) and rows is not None and shape[0] != rows:
            return (
                f"{name} has {shape[0]:,} rows, and {rows:,} in the base: the vocabulary was "
                "resized. Give the model as it was before tokens were added or cut."
            )
    return ""


def _in_another_dtype(delta: Delta, wrong: Mapping[str, TensorKind]) -> str:
    """A sentence where rounding explains that nearly all weights differ, or ""."""
    if 2 * len(wrong.keys() & delta.weights.keys()) < len(delta.weights):
        return ""  # rounding would show in nearly all
    for name, (held, _) in wrong.items():
        base = delta.header.base
        default = getattr(torch, base.kept_dtypes.get(name, base.dtype))
        wanted = delta.weights[name].dtype if name in delta.weights else default
        if held == wanted:
            continue
        have, need = (str(dtype).removeprefix("torch.") for dtype in (held, wanted))
        if holds(held, wanted):
            return (
                f"It holds {have} weights, and the delta fits those of {base.path} rounded to "
                f"{need}: sift rounds them by itself, from_pretrained does with dtype={wanted}."
            )
        return (
            f"It holds {have} weights, and the delta fits {need} ones, whose last bits {have} has "
            f"lost: give the {need} checkpoint."
        )
    return ""


def _changed_already(delta: Delta, marks: Mapping[str, str], merged: bool) -> str:
    """A sentence where the model is what applying (or undoing) would give, or ""."""
    pairs = [(one.base, one.trained)[:: -1 if merged else 1] for one in delta.weights.values()]
    held = [marks.get(name) for name in delta.weights]
    if held != [after for _, after in pairs] or all(before == after for before, after in pairs):
        return ""
    return "It is the base itself." if merged else "The delta is in it already."


def rest_fingerprints(marks: Mapping[str, str], touched: Iterable[str]) -> str:
    """Eight hex digits for each tensor that a delta leaves alone, in the order of sorted names."""
    left = sorted(set(marks) - set(touched))
    return "".join(marks[name][:8] for name in left)


def check_base(
    delta: Delta,
    marks: Mapping[str, str],
    source: str,
    merged: bool = False,
    *,
    kinds: Mapping[str, TensorKind] | None = None,
    tied: Mapping[str, str] | None = None,
) -> None:
    """Raises SiftError (exit code 3) naming the tensors in which `source` is not the delta's base.

    `marks` holds the fingerprint of each of the base's tensors, by name; `merged` says that
    `source` is the merged model, turned back. `kinds` and `tied`, where known, are what the source
    holds: they say more of what is wrong.
    """
    lacking, wrong = differing(delta, marks)
    if not lacking and not wrong:
        return
    names = lacking + wrong
    base = delta.header.base
    role = "the merged model" if merged else "the base"
    which = ("is lacking or ", "are lacking or ") if lacking else ("", "")
    told = counted(len(names), f"tensor {which[0]}differs", f"tensors {which[1]}differ")
    raise SiftError(
        f"{source} is not {role} of this delta, which was trained on {base.path} "
        f"({base.dtype}); {told}:\n"
        f"  {in_lines(names)}\n{advice(delta, marks, kinds or {}, tied or {}, names, merged)}",
        ExitCode.WRONG_FILE,
    )
