"""How a causal language model makes logits of its hidden states, and whether sift can do the same.

Whoever takes few of the positions through the head, or a few at a time, must do to the logits what
the model's own forward pass does to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from sift_cli.models.devices import evaluating
from sift_cli.models.fingerprints import probe_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Made = TypeVar("Made")
WITHIN = "within_forward"  # the method of a model in rows that is called in place of its forward
INPUTS = ("input_ids", "attention_mask", "position_ids")
WIDEST = 80.0  # made-up logits reach from minus this to this: no cap is left unseen


def _capped(logits: Tensor, cap: float) -> Tensor:
    return torch.tanh(logits / cap) * cap


def _times(logits: Tensor, factor: float) -> Tensor:
    return logits * factor


def _over(logits: Tensor, divisor: float) -> Tensor:
    return logits / divisor


# What architectures do to the output of their head, by the key of the configuration that says so,
# in the order in which it is done.
STEPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logit_scale": _times,
    "lm_head_multiplier": _times,
    "logits_scaling": _over,
    "final_logit_softcapping": _capped,
    "logits_soft_cap": _capped,
}


@dataclass(frozen=True)
class Readout:
    """From hidden states to logits: the head, then each of STEPS with its number."""

    steps: tuple[tuple[str, float], ...] = ()

    def __call__(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """The logits ([P, V]) of hidden states ([P, d])."""
        return self.after(head(hidden))

    def after(self, logits: Tensor) -> Tensor:
        """What becomes of the head's own output, of any shape."""
        for key, number in self.steps:
            logits = STEPS[key](logits, number)
        return logits


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a model is called with for a batch: what it reads, and no cache.

    A cache that nothing will read takes memory, and where there is one transformers looks for no
    boundaries among packed rows.
    """
    return {key: batch[key] for key in INPUTS if key in batch} | {"use_cache": False}


def within_forward(model: nn.Module, work: Callable[[], Made]) -> Made:
    """What `work` makes of a model's parts, as a forward pass of the model.

    One that lies in rows on several ranks then gathers the weights of its embeddings and its head,
    and does so again for the backward pass from the tensors that were made. No such pass may be a
    part of another.
    """
    run = getattr(model, WITHIN, None)
    return work() if run is None else run(work)


def hidden_states(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states of a batch, [B, T, d]: what the head sees."""
    return within_forward(model, partial(states_of, model, batch))


def states_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The same as a part of a forward pass (`within_forward`), that may go on to the head."""
    hidden: Tensor = model.base_model(**inputs_of(batch)).last_hidden_state
    return hidden


def whole_logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits of every position by the model's own forward pass, [B, T, V]."""
    logits: Tensor = model(**inputs_of(batch)).logits
    return logits


@torch.no_grad()
def readout_of(model: PreTrainedModel) -> Readout | str:
    """How the model makes logits of hidden states; or in words why that is not known.

    Its own forward pass runs once, on a few made-up tokens, with made-up numbers in place of the
    head's output: what the head was given must be the last hidden states, and what becomes of the
    numbers must be what the readout makes of them.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return "it has no output head that stands apart"
    ids = probe_inputs(model.config)[:1, :6].to(model.device)
    given: list[Tensor] = []
    wide: list[Tensor] = []

    def exchange(_: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> Tensor:
        given.append(arguments[0])
        wide.append(torch.linspace(-WIDEST, WIDEST, out.numel()).to(out).view(out.shape))
        return wide[-1]

    with evaluating(model):
        hidden = hidden_states(model, {"input_ids": ids})
        handle = head.register_forward_hook(exchange)
        try:
            found = whole_logits(model, {"input_ids": ids})
        finally:
            handle.remove()
    if len(given) != 1 or not same(given[0], hidden):
        return "its head sees something else than the last hidden states"
    for readout in _candidates(model.config.get_text_config()):
        if same(readout.after(wide[0]), found):
            return readout
    return "it does to its logits what sift does not know"


def _candidates(config: Any) -> Iterator[Readout]:
    """Readouts that a configuration may mean: with all the steps that it names, then fewer."""
    named = [(key, getattr(config, key, None)) for key in STEPS]
    steps = [(key, float(number)) for key, number in named if isinstance(number, int | float)]
    counts = range(len(steps), -1, -1)
    return map(Readout, chain.from_iterable(combinations(steps, count) for count in counts))


def apart(found: Tensor, wanted: Tensor) -> float:
    """The 2-norm of the difference over that of `wanted`."""
    difference = torch.linalg.vector_norm(found.double() - wanted.double())
    return float(difference / torch.linalg.vector_norm(wanted.double()))


def tolerance(dtype: torch.dtype) -> float:
    """Up to how far `apart` two ways to compute the same in that dtype may be."""
    return max(1e-3, 4 * torch.finfo(dtype).eps)


def same(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same but for rounding."""
    fits = found.shape == wanted.shape and found.dtype == wanted.dtype
    return fits and apart(found.cpu(), wanted.cpu()) < tolerance(found.dtype)
