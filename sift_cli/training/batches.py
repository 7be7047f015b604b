"""Which rows make which step: shuffled, bucketed by length, seeded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch

from sift_cli.recipe import TrainSection
from sift_cli.tasks.tokens import cut

POOL = 50  # batches among which rows of like length are brought together


def bucketed(lengths: Sequence[int], size: int, seed: int) -> list[list[int]]:
    """Every row once, in batches of `size` (one may be smaller) whose rows are of like length.

    Rows are shuffled, sorted by length within pools of 50 batches, cut, and the batches shuffled.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), POOL * size):
        pool = sorted(order[start : start + POOL * size], key=lambda row: -lengths[row])
        batches += [pool[at : at + size] for at in range(0, len(pool), size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[at] for at in shuffled]


@dataclass(frozen=True)
class Batches:
    """The rows of every step of a run: up to `batch_size * accumulate` in each of `steps`.

    `max_tokens` bounds what is computed at once, not what makes a step.
    """

    lengths: Sequence[int]
    batch_size: int
    accumulate: int
    steps: int
    seed: int
    max_tokens: int | None = None

    @classmethod
    def plan(
        cls,
        lengths: Sequence[int],
        *,
        batch_size: int,
        accumulate: int,
        epochs: float,
        max_steps: int | None,
        seed: int,
        max_tokens: int | None = None,
    ) -> "Batches":
        """`epochs` passes over the rows, or `max_steps` steps where that is less."""
        steps = ceil(epochs * ceil(len(lengths) / (batch_size * accumulate)))
        steps = min(steps, max_steps or steps)
        return cls(lengths, batch_size, accumulate, steps, seed, max_tokens)

    @classmethod
    def of(cls, train: TrainSection, lengths: Sequence[int]) -> "Batches":
        """Those that a recipe's section asks for, over rows of so many tokens each."""
        return cls.plan(
            lengths,
            batch_size=train.batch_size,
            accumulate=train.accumulate,
            epochs=train.epochs,
            max_steps=train.max_steps,
            seed=train.seed,
            max_tokens=train.max_tokens,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the rows."""
        return ceil(len(self.lengths) / (self.batch_size * self.accumulate))

    def __iter__(self) -> Iterator[list[list[int]]]:
        """The micro-batches of each step: at most `batch_size` row indices, in `max_tokens`."""
        return self.since(1)

    def endless(self) -> Iterator[list[list[int]]]:
        """The micro-batches of each step, epoch after epoch without an end."""
        return replace(self, steps=2**62).since(1)

    def since(self, step: int) -> Iterator[list[list[int]]]:
        """The micro-batches of each step from the given one (1 is the first) to the last."""
        epoch, skip = divmod(step - 1, self.steps_per_epoch)
        while step <= self.steps:
            order = bucketed(
                self.lengths, self.batch_size * self.accumulate, self.seed * 1_000_003 + epoch
            )
            for rows in order[skip : skip + self.steps - step + 1]:
                step += 1
                yield cut(rows, self.lengths, self.batch_size, self.max_tokens)
            epoch, skip = epoch + 1, 0
