"""From trained parameters to a delta."""

from collections.abc import Collection, Mapping
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel

from sift_cli import __version__
from sift_cli.delta.file import SIGNED, Delta, weight_delta
from sift_cli.delta.identity import rest_fingerprints
from sift_cli.models.fingerprints import tied_names
from sift_cli.sparse import SparseParameters, Support


def build_delta(
    parameters: SparseParameters,
    new: Collection[str],
    marks: Mapping[str, str],
    about: dict[str, Any],
) -> Delta:
    """The difference between the model's weights now and before any of them trained.

    It holds the entries of the support, and under a changing support all others that differ from
    the base. `new` names the parameters that the base lacks: they are stored whole. `marks` are the
    fingerprints of all other tensors of the model, taken before training.
    """
    supports = {segment.name: segment.support for segment in parameters}
    touched = {name: (support, base) for name, support, base in parameters.touched}
    weights, dense = {}, {}
    for name, weight in parameters.model.named_parameters():
        if name not in touched:
            continue
        if name in new:
            dense[name] = weight.detach().cpu().clone()
            continue
        support, base = touched[name]
        trained = support.to(weight.device).gather(weight).cpu()
        held = supports.get(name)
        if held is None or len(held) < len(support):
            bits = SIGNED[base.element_size()]  # so that -0 is not 0
            keep = base.view(bits) != trained.view(bits)
            every = support.positions
            if every is None:
                every = torch.arange(support.size)
            if held is not None and held.positions is not None:
                keep |= torch.isin(every, held.positions.cpu())
            support, base, trained = (
                Support.of(support.shape, every[keep]),
                base[keep],
                trained[keep],
            )
        if len(support):
            whole = weight.detach()
            weights[name] = weight_delta(support, base, trained, marks[name], whole)
    return Delta(weights, dense, rest_fingerprints(marks, weights), about)


def describe_base(
    model: PreTrainedModel, path: str, revision: str | None, dtype: str
) -> dict[str, Any]:
    """What a delta says of its base: where it lies, and how `model`, made from it, holds it."""
    default = getattr(torch, dtype)
    return {
        "path": path,
        "revision": revision,
        "dtype": dtype,
        "architectures": model.config.architectures,
        "kept_dtypes": {
            name: str(weight.dtype).removeprefix("torch.")
            for name, weight in model.named_parameters()
            if weight.dtype != default
        },
        "tied": tied_names(model),
        "vocabulary": getattr(model.config, "vocab_size", None),
    }


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {"sift": __version__, "torch": version("torch"), "transformers": version("transformers")}
