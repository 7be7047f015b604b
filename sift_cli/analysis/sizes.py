"""Counts and bytes of a run that follow from the shapes of its weights alone."""

import re
from collections.abc import Mapping, Sequence
from math import lgamma, log

from torch import nn

from sift_cli.models.loading import DTYPES
from sift_cli.sparse.parameters import ROOM

VALUE_BYTES = {"float32": 3.25, "bfloat16": 1.24}  # measured of MiniLM (docs/benchmarks-delta.md)
HEADER_BYTES, ROW_BYTES = 2_000, 130  # recipe and the like, and what each weight adds


def grouped(
    counts: Mapping[str, int], sizes: Mapping[str, int], by: int
) -> dict[str, dict[str, int]]:
    """Trained and all entries of the targeted weights: `by` layer (0) or kind of module (1)."""
    groups: dict[str, dict[str, int]] = {}
    for name, count in counts.items():
        group = groups.setdefault(layer_and_kind(name)[by], {"trained": 0, "of": 0})
        group["trained"] += count
        group["of"] += sizes[name]
    return groups


def layer_and_kind(name: str) -> tuple[str, str]:
    """`a.layer.3.b.query.weight` -> (`layer 3`, `b.query`); what is in no layer is `outside`."""
    module = re.sub(r"\.(?:weight|bias)$", "", name)  # experts in one tensor have neither
    inside = re.search(r"\.(\d+)\.(.+)$", module)
    return (f"layer {inside[1]}", inside[2]) if inside else ("outside", module)


def delta_bytes(
    counts: Mapping[str, int], sizes: Mapping[str, int], dense: Sequence[str], dtype: str
) -> int:
    """About the bytes of the delta: the entropy of the positions, the values, the head."""
    bits = sum(log_choices(sizes[name], count) for name, count in counts.items()) / log(2)
    values = VALUE_BYTES[dtype] * sum(counts.values())
    head = DTYPES[dtype].itemsize * sum(sizes[name] for name in dense)
    return round(bits / 8 + values + head + HEADER_BYTES + ROW_BYTES * len(counts))


def sent(entries: int, total: int, dtype: str, devices: int) -> dict[str, int]:
    """Bytes that each of so many devices sends in a step, by method.

    A ring sends 2 (N - 1) / N of a message (Patarasuk and Yuan 2009). Gradients of `entries` travel
    in fp32, be they entries of sift or an adapter's of the same size, and those of all of `total`
    in the dtype of the weights.
    """
    messages = {
        "sift": (entries + ROOM) * 4,
        "lora": entries * 4,
        "full": total * DTYPES[dtype].itemsize,
    }
    return {name: round(2 * (devices - 1) / devices * one) for name, one in messages.items()}


def log_choices(size: int, count: int) -> float:
    """Natural logarithm of the number of ways to choose `count` of `size`."""
    return lgamma(size + 1) - lgamma(count + 1) - lgamma(size - count + 1)


def accounting(model: nn.Module, entries: int) -> dict[str, int]:
    """Bytes as papers count them: the gradients of the trained entries in the dtype of the weights,
    two fp32 moments for each, and no masters, positions or buffers (SIFT, arXiv 2312.11875, table
    1, which counts in units of 2**30)."""
    weights = list(model.parameters())
    return {
        "weights": sum(weight.numel() * weight.element_size() for weight in weights),
        "gradients": entries * weights[0].element_size(),
        "moments": entries * 2 * 4,
    }
