"""The loss of one step and its gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sift_cli.models.devices import autocast, place
from sift_cli.runs.session import Session


def add_gradient(session: Session, rows: Sequence[list[int]], total: int | None = None) -> Tensor:
    """Adds the gradient of the mean loss over all rows of a step; returns that mean, of shape [].

    Each micro-batch counts by its rows, so 1 x 16 equals 4 x 4, whatever its last one holds.
    `total` stands in for the number of rows, where `rows` are only some of a step's.
    """
    assert session.train is not None
    total = total or sum(map(len, rows))
    loss = torch.zeros((), device=session.device)
    for part in rows:
        batch = place(session.collate(session.train.take(part)), session.device)
        with autocast(session.device, session.bf16):
            mean = session.model(**batch).loss
        share = mean.float() * (len(part) / total)
        share.backward()
        loss += share.detach()
    return loss
