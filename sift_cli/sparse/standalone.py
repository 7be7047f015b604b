"""AdamW over a support that stays, as any loop drives an optimizer of torch."""

from collections.abc import Callable
from typing import Any

import torch

from sift_cli.errors import SiftError
from sift_cli.sparse.parameters import SparseParameters

MASTERS = "masters"  # in the state


class FlatAdamW(torch.optim.AdamW):
    """torch's AdamW over the flat buffer.

    A step clips the gradient to a 2-norm of `max_grad_norm` (None: it does not), moves the masters,
    rounds them into the model's weights, and clears the gradient: loops clear and clip what the
    model calls its parameters, and the buffer is none of them. The state holds the masters, so
    that a loop that loads it goes on to the bit. A class of torch's own, because schedulers and
    Accelerate take no other.
    """

    def __init__(
        self,
        parameters: SparseParameters,
        lr: float,
        *,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__([parameters.flat], lr=lr, weight_decay=weight_decay, fused=True)
        self.sparse, self.max_grad_norm = parameters, max_grad_norm

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradient buffer; returns what `closure` does, which runs before it.

        Raises SiftError where the model has been moved to another device meanwhile.
        """
        sparse = self.sparse
        loss = None if closure is None else closure()
        here, there = sparse.flat.device, sparse.segments[0].weight.device
        if here != there:
            raise SiftError(
                f"sparsify: the model was on {here} then and is on {there} now; move it first"
            )
        sparse.flat.grad = sparse.grad  # someone may have set it to None
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([sparse.flat], self.max_grad_norm)
        super().step()
        sparse.write_back()
        sparse.zero_grad()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradient buffer, which stays in place."""
        self.sparse.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """That of torch's AdamW, and the masters."""
        return {**super().state_dict(), MASTERS: self.sparse.flat.detach()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken, over the same support; writes the weights.

        Raises SiftError for the state of another one.
        """
        masters, flat = state_dict.get(MASTERS), self.sparse.flat
        if masters is None or masters.shape != flat.shape:
            raise SiftError(
                "sparsify: this state is of another optimizer; choose the entries as they were "
                "chosen for it: the same base, batches, density and policy"
            )
        super().load_state_dict(state_dict)
        flat.data.copy_(masters)
        self.sparse.write_back()
