"""Dropout on a CPU at a fraction of its cost: 16 random bits an element, and less to hold.

torch draws its masks serially, at up to a fifth of a training step, and keeps them in the
element's own dtype. Here an element costs a quarter of a random word and one byte, and attention
holds one tensor of its probabilities instead of three. The distribution is that of `nn.Dropout`;
the random numbers differ.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import islice
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn

from sift_cli.models.attention import replace_sdpa

ATTENTION = "sift_sdpa"
LEVELS = 1 << 16
IN_CACHE = 1 << 19  # scores handled at a time


def quicken_dropout(model: nn.Module) -> Callable[[], None]:
    """Replaces the dropout of a model on a CPU, in its layers and in transformers' sdpa attention.

    Returns what undoes it. Does nothing on other devices; out of training mode nothing changes.
    """
    if next(model.parameters()).device.type != "cpu":
        return lambda: None
    layers = [one for one in model.modules() if type(one) is nn.Dropout and not one.inplace]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    give_back = replace_sdpa(model, ATTENTION, _sdpa, _mask)

    def undo() -> None:
        for layer in layers:
            del layer.forward
        give_back()

    return undo


def dropout(x: Tensor, p: float) -> Tensor:
    """`x` with each element zero with probability p, in steps of 2**-16, the others scaled up."""
    threshold = round(p * LEVELS)
    if threshold <= 0 or threshold >= LEVELS:
        return torch.nn.functional.dropout(x, p)
    out: Tensor = _Dropout.apply(x, threshold)  # type: ignore[no-untyped-call]
    return out


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, scale: float
) -> Tensor:
    """Scaled dot-product attention with dropout p of its probabilities.

    `query` [B, h, T, d], `key` and `value` [B, h, S, d], `mask` [B or 1, h or 1, T, S]:
    bool (True: attend) or added to the scores. Returns [B, h, T, d].
    """
    threshold = round(p * LEVELS)
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, lowest)
    with torch.autocast(query.device.type, enabled=False):
        out: Tensor = _Attention.apply(query, key, value, mask, threshold, scale)  # type: ignore[no-untyped-call]
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: int) -> Tensor:
        keep = _keep(x.shape, threshold)
        ctx.save_for_backward(keep)
        ctx.scale = LEVELS / (LEVELS - threshold)
        return torch.where(keep, x, 0.0).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        return torch.where(keep, grads[0], 0.0).mul_(ctx.scale), None


class _Attention(torch.autograd.Function):
    """Holds query, key, value and the probabilities, of which those dropped are negative."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        threshold: int,
        scale: float,
    ) -> Tensor:
        kept_scale = LEVELS / (LEVELS - threshold)
        signed = query.new_empty(*query.shape[:-1], key.shape[-2])
        out = torch.empty_like(query)
        for part, keep in _masked_parts(signed, threshold):
            scores = query[part] @ key[part].transpose(-1, -2)
            scores.mul_(scale)
            if mask is not None:
                scores.add_(mask if len(mask) == 1 else mask[part])
            probabilities = torch.softmax(scores, -1)
            torch.where(keep, probabilities, -probabilities, out=signed[part])
            torch.clamp_min(signed[part], 0, out=scores)
            torch.matmul(scores, value[part], out=out[part])
        ctx.save_for_backward(query, key, value, signed)
        ctx.scales = scale, kept_scale
        return out.mul_(kept_scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, signed = ctx.saved_tensors
        scale, kept_scale = ctx.scales
        grad = grads[0] * kept_scale
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for part in _parts(signed):
            held = signed[part]
            kept = held.clamp_min(0)
            torch.matmul(kept.transpose(-1, -2), grad[part], out=found[2][part])
            torch.matmul(grad[part], value[part].transpose(-1, -2), out=kept)
            # What was dropped passes no gradient on, yet has its share in the softmax's.
            kept = torch.where(held > 0, kept, 0.0)
            grad_scores = torch.ops.aten._softmax_backward_data(kept, held.abs(), -1, held.dtype)
            torch.matmul(grad_scores.mul_(scale), key[part], out=found[0][part])
            torch.matmul(grad_scores.transpose(-1, -2), query[part], out=found[1][part])
        grad_query, grad_key, grad_value = found
        return grad_query, grad_key, grad_value, None, None, None


_most_parts: ContextVar[int | None] = ContextVar("most_parts", default=None)


@contextmanager
def first_part_alone() -> Iterator[None]:
    """Within, attention computes the first part of its batch alone, and its results are wrong.

    For counting memory: every part holds as much as the first, one after the other.
    """
    before = _most_parts.set(1)
    try:
        yield
    finally:
        _most_parts.reset(before)


def _parts(scores: Tensor, count: int | None = None) -> Iterator[slice]:
    """Slices of the batch, or of one of `count` rows, whose scores stay in a core's cache."""
    rows = max(1, IN_CACHE // max(1, scores[0].numel()))
    total = len(scores) if count is None else count
    for start in islice(range(0, total, rows), _most_parts.get()):
        yield slice(start, min(start + rows, total))


_among: ContextVar[tuple[Sequence[int], int] | None] = ContextVar("among", default=None)


@contextmanager
def masks_of(rows: Sequence[int], count: int) -> Iterator[None]:
    """Within it, a batch has the masks that these `rows` (sorted) have in one of `count` rows.

    The random numbers of all are drawn. It holds for layers whose first dimension is the batch's.
    """
    before = _among.set((rows, count))
    try:
        yield
    finally:
        _among.reset(before)


def _masked_parts(scores: Tensor, threshold: int) -> Iterator[tuple[slice, Tensor]]:
    """The slices of `_parts`, and the mask of each, in the shape of its scores."""
    if (among := _among.get()) is None:
        yield from ((part, _drawn(scores[part].shape, threshold)) for part in _parts(scores))
        return
    rows, count = among
    for part in _parts(scores, count):
        keep = _drawn(torch.Size([part.stop - part.start, *scores.shape[1:]]), threshold)
        first, last = bisect_left(rows, part.start), bisect_left(rows, part.stop)
        if first < last:
            yield slice(first, last), keep[[row - part.start for row in rows[first:last]]]


def _keep(shape: torch.Size, threshold: int) -> Tensor:
    """The mask of a tensor of this shape, of which the first dimension is the batch's."""
    among = _among.get()
    if among is None or shape[0] % len(among[0]):
        return _drawn(shape, threshold)
    rows, count = among
    each = shape[0] // len(rows)
    keep = _drawn(torch.Size([count, each, *shape[1:]]), threshold)
    return keep[list(rows)].flatten(0, 1)


def _drawn(shape: torch.Size, threshold: int) -> Tensor:
    """A bool mask, False with probability threshold / 2**16, from the default generator."""
    count = prod(shape)
    words = torch.empty(ceil(count / 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[:count].view(shape)
    return bits >= threshold - LEVELS // 2


def _forward(layer: nn.Dropout, input: Tensor) -> Tensor:
    if not layer.training or not torch.is_grad_enabled():
        return torch.nn.functional.dropout(input, layer.p, layer.training)
    return dropout(input, layer.p)


def _mask(**kwargs: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    made: Tensor | None = sdpa_mask(**kwargs)
    return made


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention; with dropout and nothing out of the ordinary, the above."""
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    plain = (
        torch.is_grad_enabled()
        and 0 < round(dropout * LEVELS) < LEVELS
        and not (causal and attention_mask is None)
        and query.shape[:2] == key.shape[:2]
        and kwargs.get("position_bias") is None
        and kwargs.get("cache") is None
    )
    if not plain:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return out, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    made = attention(query, key, value, attention_mask, dropout, scale)
    return made.transpose(1, 2).contiguous(), None
