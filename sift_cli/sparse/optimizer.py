"""AdamW over the flat buffer, with the rounding into the weights that belongs to each step."""

import torch

from sift_cli.sparse.parameters import SparseParameters


class SparseAdamW:
    """AdamW (Loshchilov and Hutter, 2019) over the selected entries: one fused call per step.

    Moments are fp32 and of shape [K], whatever the dtype of the base. Weight decay pulls every
    trained entry towards zero, as torch.optim.AdamW does with the parameters it is given.
    """

    def __init__(
        self,
        parameters: SparseParameters,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters = parameters
        self.adamw = torch.optim.AdamW(
            [parameters.flat],
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=True,
        )

    def clip(self, max_norm: float | None) -> torch.Tensor:
        """Scales the gradient to a 2-norm of at most `max_norm`; returns its norm before."""
        limit = float("inf") if max_norm is None else max_norm
        return torch.nn.utils.clip_grad_norm_([self.parameters.flat], limit)

    def step(self) -> None:
        """One update from the gradient buffer, written into the weights; then clears the buffer."""
        self.adamw.step()
        self.parameters.write_back()
        self.parameters.zero_grad()
