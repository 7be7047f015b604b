"""Which weights take part: name patterns over a model's parameters."""

import difflib
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate

from torch import nn

from sift_cli.errors import SiftError

KEYWORDS = ("all-linear", "all")


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern's dotted parts stand next to each other somewhere in the dotted `name`.

    `attention.output.dense` matches `bert.encoder.layer.0.attention.output.dense.weight`; each part
    may hold shell wildcards (`layer.[0-5].attention`).
    """
    wanted = [re.compile(translate(part)) for part in pattern.split(".")]
    parts = name.split(".")
    return any(
        all(regex.match(part) for regex, part in zip(wanted, parts[start:], strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )


def choose_weights(
    model: nn.Module,
    target: str | Sequence[str],
    exclude: Sequence[str],
    dense: Sequence[str],
    new: Iterable[str],
) -> tuple[list[str], list[str]]:
    """Names of the weights that train sparsely, and of those all of whose entries train.

    `target` is `all-linear` (weights and biases of linear layers, but for the one that gives the
    logits of a vocabulary, as PEFT and SIFT's paper have it), `all`, or name patterns. All
    entries train of what matches `dense` and of what `new` names: what the checkpoint did not hold
    is random and has no base to differ from. Raises SiftError for a pattern in `target` or
    `exclude` that matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    fresh = set(new)
    patterns = [target] if isinstance(target, str) else list(target)
    for key, given in (("target", patterns), ("exclude", exclude)):
        for pattern in given:
            if pattern not in KEYWORDS and not any(matches(pattern, name) for name in names):
                raise _no_match(key, pattern, names)
    full = [
        name for name in names if name in fresh or any(matches(pattern, name) for pattern in dense)
    ]
    linear = linear_layers(model).keys() - output_head(model)
    taken, sparse = set(full), []
    for name in names:
        if name in taken or any(_targets(pattern, name, linear) for pattern in exclude):
            continue
        if any(_targets(pattern, name, linear) for pattern in patterns):
            sparse.append(name)
    return sparse, full


def output_head(model: nn.Module) -> set[str]:
    """Names of the parameters of the layer that gives a language model's logits."""
    find = getattr(model, "get_output_embeddings", lambda: None)
    own = {id(weight) for weight in (find() or nn.Identity()).parameters()}
    return {name for name, weight in model.named_parameters() if id(weight) in own}


def left_out(
    model: nn.Module, target: str | Sequence[str], trained: Container[str]
) -> dict[str, int]:
    """The sizes of the weights that `all-linear` goes past: matrices of no linear layer.

    Such are the experts of a mixture that lie in one tensor. Embeddings are not meant, nor what is
    `trained`, nor is anything where another target was asked for.
    """
    if "all-linear" not in ([target] if isinstance(target, str) else target):
        return {}
    known = linear_layers(model).keys() | output_head(model)
    known |= {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Embedding) or type(module).__name__.endswith("Embeddings")
        for name, _ in module.named_parameters(recurse=False)
    }
    return {
        name: weight.numel()
        for name, weight in model.named_parameters()
        if weight.dim() > 1 and name not in known and name not in trained
    }


def tell_left_out(sizes: Mapping[str, int]) -> str:
    """What to say of the weights of `left_out`, with the target that would train them."""
    kinds = dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in sizes)
    return (
        f"all-linear leaves out {sum(sizes.values()):,} entries in {len(sizes)} weights of no "
        f"linear layer; they train with selection.target: [all-linear, {', '.join(kinds)}]"
    )


def choose_vectors(model: nn.Module, exclude: Sequence[str], dense: Iterable[str]) -> list[str]:
    """Names of the biases and norm weights: the 1-d parameters beside `dense` and `exclude`."""
    linear, taken = linear_layers(model), set(dense)
    return [
        name
        for name, weight in model.named_parameters()
        if weight.dim() == 1
        and name not in taken
        and not any(_targets(pattern, name, linear) for pattern in exclude)
    ]


def _targets(pattern: str, name: str, linear: Container[str]) -> bool:
    if pattern == "all":
        return True
    return name in linear if pattern == "all-linear" else matches(pattern, name)


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer; `transposed` where it stores its weight as [inputs, outputs]."""

    module: nn.Module
    transposed: bool


def linear_layers(model: nn.Module) -> dict[str, LinearLayer]:
    """The linear layer of each weight and bias that has one; GPT-2's Conv1D is transposed."""
    return {
        f"{prefix}.{name}" if prefix else name: LinearLayer(
            module, not isinstance(module, nn.Linear)
        )
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        for name, _ in module.named_parameters(recurse=False)
    }


def transposed_of(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the weights called `names` that are stored as [inputs, outputs]."""
    layers = linear_layers(model)
    return [name for name in names if name in layers and layers[name].transposed]


def density_of(density: float | Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """The density of each of `names`: the same for all, or that of the last pattern that matches.

    Raises SiftError for a pattern that matches none of them.
    """
    names = list(names)
    if not isinstance(density, Mapping):
        return dict.fromkeys(names, density)
    densities = dict.fromkeys(names, density["default"])
    for pattern, own in density.items():
        if pattern == "default":
            continue
        matched = [name for name in names if matches(pattern, name)]
        if not matched:
            raise _no_match("density", pattern, names)
        densities.update(dict.fromkeys(matched, own))
    return densities


def _no_match(key: str, pattern: str, names: Sequence[str]) -> SiftError:
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    near = difflib.get_close_matches(pattern.split(".")[-1], parts, n=3) or parts[:12]
    return SiftError(
        f"selection.{key}: no {'targeted ' if key == 'density' else ''}parameter of the model "
        f"matches {pattern!r}; its names hold parts such as {', '.join(near)}"
        + ("" if key == "density" else f" (keywords: {', '.join(KEYWORDS)})")
    )
