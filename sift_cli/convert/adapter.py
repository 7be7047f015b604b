"""Where each change of a delta goes in PEFT's SHiRA layout."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sift_cli.delta.file import Delta
from sift_cli.errors import SiftError
from sift_cli.sparse import Support


@dataclass(frozen=True)
class Adapter:
    """Where each change of a delta goes in PEFT's SHiRA layout.

    `shira` has the support of each linear layer's weight by the layer's name, and `rank` PEFT's r:
    each of these layers gets r * (inputs + outputs) entries. `whole` names the modules of which all
    parameters are stored, `biases` the parameters whose values replace the base's, `refused` the
    tensors that the layout does not hold, with the reason.
    """

    rank: int
    shira: dict[str, Support]
    whole: list[str]
    biases: list[str]
    refused: dict[str, str]


def sort_changes(model: nn.Module, delta: Delta, heads: tuple[str, ...], whole: bool) -> Adapter:
    """Sorts every changed tensor into what PEFT's SHiRA layout has for it.

    PEFT stores modules whose names end with one of `heads` whole, asked or not. With `whole`,
    modules that it has no sparse form for are stored whole. Raises SiftError where
    no linear layer would be sparse.
    """
    modules = dict(model.named_modules())
    saved = {module_of(name) for name in delta.dense}
    saved |= {name for name in modules if name.endswith(heads)}
    saved = _with_suffixes(saved, modules)
    tied = _tied(model)
    linear: dict[str, Support] = {}
    biases: list[str] = []
    refused: dict[str, str] = {}
    for name, weight in delta.weights.items():
        owner = module_of(name)
        module = modules[owner]
        if _inside(owner, saved):
            continue
        if name in tied:
            refused[name] = "tied to another tensor"
        elif type(module) is nn.Linear and name.endswith(".weight"):
            linear[owner] = weight.support
        elif type(module) is nn.Linear:
            biases.append(name)
        elif any(True for _ in module.children()):
            refused[name] = f"part of {type(module).__name__}, which has other parts"
        elif whole or all(one.dim() < 2 for one in module.parameters()):
            saved.add(owner)
        else:
            refused[name] = f"{type(module).__name__}, no linear layer"
    rank, fitting = choose_rank(linear)
    for owner in linear.keys() - fitting:
        if whole:
            saved.add(owner)
        else:
            refused[f"{owner}.weight"] = "more changed entries than one r for all layers holds"
    saved = _with_suffixes(saved, modules)
    shira = {name: support for name, support in linear.items() if name in fitting - saved}
    if not shira:
        raise SiftError(
            "none of the delta's weights is one of a linear layer that PEFT's SHiRA holds "
            f"(layers such as {next(iter(refused), 'the head')}); sift merge writes the "
            "whole model"
        )
    biases = [name for name in biases if not _inside(module_of(name), saved)]
    outermost = sorted(name for name in saved if not _inside(name, saved - {name}))
    return Adapter(rank, shira, outermost, biases, refused)


def choose_rank(linear: Mapping[str, Support]) -> tuple[int, set[str]]:
    """The one r for all layers that holds most of them in the least space, and which it holds.

    SHiRA gives a weight of m x n exactly r * (m + n) entries, at most m * n: a layer fits where its
    changed entries are no more than that; it is filled up with entries of no change.
    """
    lowest = {name: -(-len(s) // sum(s.shape)) for name, s in linear.items()}
    highest = {name: s.size // sum(s.shape) for name, s in linear.items()}

    def fitting(rank: int) -> set[str]:
        return {name for name in linear if lowest[name] <= rank <= highest[name]}

    def merit(rank: int) -> tuple[int, int]:
        return len(fitting(rank)), -rank

    best = max({*lowest.values()} or {1}, key=merit)
    return best, fitting(best)


def module_of(name: str) -> str:
    """The module that a parameter is of."""
    return name.rpartition(".")[0]


def _inside(name: str, saved: Collection[str]) -> bool:
    """Whether a module is one of `saved` or a part of one."""
    return any(name == one or name.startswith(f"{one}.") for one in saved)


def _with_suffixes(saved: Collection[str], modules: Collection[str]) -> set[str]:
    """The modules of which PEFT saves all parameters if asked for `saved`: it compares ends."""
    return {name for name in modules if name and name.endswith(tuple(saved))}


def _tied(model: nn.Module) -> set[str]:
    """All names of the parameters that have several."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def shira_entries(
    support: Support, base: Tensor, trained: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Row and column ([2, K], int32) and change ([K], fp32) of rank * (m + n) entries, in order.

    The first entries outside the support fill up what it has less; their change is 0.
    """
    count = rank * sum(support.shape)
    taken = torch.zeros(support.size, dtype=torch.bool)
    taken[slice(None) if support.positions is None else support.positions.long()] = True
    spare = (~taken).nonzero().flatten()[: count - len(support)]
    taken[spare] = True
    flat = taken.nonzero().flatten()
    change = trained.reshape(-1)[flat].float() - base.reshape(-1)[flat].float()
    width = support.shape[1]
    return torch.stack([flat // width, flat % width]).to(torch.int32), change
