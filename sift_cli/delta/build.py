"""From trained parameters to a delta."""

from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.metadata import version

import torch
from torch import Tensor, nn

from sift_cli import __version__
from sift_cli.delta.file import SIGNED, Delta, weight_delta
from sift_cli.delta.header import Base, Header
from sift_cli.delta.identity import rest_fingerprints
from sift_cli.models.fingerprints import dtype_name, tied_names
from sift_cli.sparse import SparseParameters, Support
from sift_cli.sparse.parameters import Changed


def build_delta(
    parameters: SparseParameters,
    new: Collection[str],
    marks: Mapping[str, str],
    header: Header,
    changes: Iterable[Changed] | None = None,
    base_of: Callable[[str], Tensor] | None = None,
) -> Delta:
    """The difference between the model's weights now and before any of them trained.

    It holds the entries of the support, and under a changing support all others that differ from
    the base. `new` names the parameters that the base lacks: all their entries are stored. `marks`
    are the fingerprints of all other tensors of the model, taken before training. `changes` are the
    parameters' own where they are at hand. Where no process holds a whole weight, `base_of` gives
    that of the base, by name.
    """
    supports = parameters.supports
    touched = {one.name: one for one in changes or parameters.changes()}
    weights, dense = {}, {}
    for name, weight in parameters.model.named_parameters():
        if name not in touched:
            continue
        one, tuned = touched[name], weight.detach()
        if base_of is not None:
            tuned = base_of(name)
            one.support.scatter_(tuned, one.now)
        if name in new:
            dense[name] = tuned.cpu().clone()
            continue
        stored = _to_store(supports.get(name), one.support, one.base, one.now)
        if len(stored[0]):
            weights[name] = weight_delta(*stored, marks[name], tuned)
    return Delta(weights, dense, rest_fingerprints(marks, weights), header)


def _to_store(
    held: Support | None, touched: Support, base: Tensor, trained: Tensor
) -> tuple[Support, Tensor, Tensor]:
    """The entries of one weight that a delta stores, with their values before and after ([K]).

    These are the ones that the support holds at the end (`held`, None for none), which training
    may have left equal to the base, and those of the others it `touched` that differ.
    """
    if held is not None and len(held) >= len(touched):
        return touched, base, trained
    bits = SIGNED[base.element_size()]  # so that -0 is not 0
    keep = base.view(bits) != trained.view(bits)
    every = touched.positions
    if every is None:
        every = torch.arange(touched.size)
    if held is not None and held.positions is not None:
        keep |= torch.isin(every, held.positions.cpu())
    return Support.of(touched.shape, every[keep]), base[keep], trained[keep]


def describe_base(model: nn.Module, path: str, revision: str | None, dtype: str) -> Base:
    """What a delta says of its base: where it lies, and how `model`, made from it, holds it."""
    default, config = getattr(torch, dtype), getattr(model, "config", None)
    values = {
        "path": path,
        "revision": revision,
        "dtype": dtype,
        "architectures": getattr(config, "architectures", None),
        "kept_dtypes": {
            name: dtype_name(weight.dtype)
            for name, weight in model.named_parameters()
            if weight.dtype != default
        },
        "tied": tied_names(model),
        "vocabulary": getattr(config, "vocab_size", None),
    }
    return Base.model_validate(values)


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {"sift": __version__, "torch": version("torch"), "transformers": version("transformers")}
