"""The arithmetic of AdamW over entries that each count their own steps."""

from math import log

import torch
from torch import Tensor


def aged_adamw_(
    values: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ages: Tensor,
    goes: Tensor | float = 1.0,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW in place, where entry k takes its `ages[k]`-th step; all tensors [K].

    `goes` ([]) is 1 for a step and 0 for one to skip without the host's knowing: then nothing
    changes, provided that the gradient is 0.
    """
    first, second = betas
    values.mul_(1 - goes * (lr * weight_decay))
    exp_avg.mul_(1 - goes * (1 - first)).add_(gradient, alpha=1 - first)
    exp_avg_sq.mul_(1 - goes * (1 - second)).addcmul_(gradient, gradient, value=1 - second)
    ages = ages.clamp(min=1)  # an entry whose first step is skipped is of age 0
    # Divided by 1 - beta^age, by way of expm1, for beta^age is next to 1 at first.
    corrected = exp_avg.mul(goes).div_(-torch.expm1(ages * log(first)))
    scale = (exp_avg_sq / -torch.expm1(ages * log(second))).sqrt_().add_(eps)
    values.addcdiv_(corrected, scale, value=-lr)
