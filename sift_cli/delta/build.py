"""From trained parameters to a delta."""

from collections.abc import Collection, Mapping
from typing import Any

from sift_cli.delta.apply import rest_fingerprints
from sift_cli.delta.file import Delta, weight_delta
from sift_cli.sparse import SparseParameters


def build_delta(
    parameters: SparseParameters,
    new: Collection[str],
    marks: Mapping[str, str],
    about: dict[str, Any],
) -> Delta:
    """The difference between the model's weights now and before `attach`.

    `new` names the parameters that the base lacks: they are stored whole. `marks` are the
    fingerprints of all other tensors of the model, taken before training.
    """
    weights, dense = {}, {}
    for segment in parameters:
        weight = segment.weight.detach()
        if segment.name in new:
            dense[segment.name] = weight.cpu().clone()
            continue
        weights[segment.name] = weight_delta(
            segment.support,
            base=parameters.base[segment.span].to(weight.dtype),
            trained=segment.support.gather(weight),
            base_mark=marks[segment.name],
            whole=weight,
        )
    return Delta(weights, dense, rest_fingerprints(marks, weights), about)
