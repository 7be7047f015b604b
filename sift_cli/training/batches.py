"""Which rows make which step: shuffled, bucketed by length or packed, seeded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch

from sift_cli.recipe import TrainSection
from sift_cli.tasks.tokens import cut

PACK = 1024  # tokens of a pack; attention costs the square, though rows do not see each other
POOL = 50  # steps among whose rows those are looked for that go together


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


def _seed(seed: int, epoch: int) -> int:
    """The seed of an epoch's order."""
    return seed * 1_000_003 + epoch


def _walk(
    step: int, steps: int, steps_per_epoch: int, order: Callable[[int], list[list[int]]]
) -> Iterator[list[int]]:
    """The rows of each step from the given one (1 is the first) to the last of `steps`.

    `order` gives those of each step of an epoch.
    """
    epoch, skip = divmod(step - 1, steps_per_epoch)
    while step <= steps:
        for rows in order(epoch)[skip : skip + steps - step + 1]:
            step += 1
            yield rows
        epoch, skip = epoch + 1, 0


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
        for rows in _walk(step, self.steps, self.steps_per_epoch, self._epoch):
            yield cut(rows, self.lengths, self.batch_size, self.max_tokens)

    def _epoch(self, epoch: int) -> list[list[int]]:
        return bucketed(self.lengths, self.batch_size * self.accumulate, _seed(self.seed, epoch))


def first_fit(rows: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """`rows` in packs of at most `tokens`: long ones first, each into the first pack with room.

    `lengths` has the tokens of every row there is. A row of more than `tokens` is a pack of its
    own.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    shortest = min((lengths[row] for row in rows), default=0)
    full = 0  # packs before this one have room for no row
    for row in sorted(rows, key=lambda row: -lengths[row]):
        while full < len(room) and room[full] < shortest:
            full += 1
        at = next((at for at in range(full, len(room)) if room[at] >= lengths[row]), len(room))
        if at == len(room):
            packs.append([])
            room.append(tokens)
        packs[at].append(row)
        room[at] -= lengths[row]
    return packs


def packs_of_epoch(lengths: Sequence[int], tokens: int, seed: int) -> list[list[int]]:
    """Every row once, in packs of at most `tokens`, by `first_fit`.

    Rows are shuffled, packed within pools of 50 packs, and the packs shuffled.
    """
    generator = torch.Generator().manual_seed(seed)
    packs: list[list[int]] = []
    pool: list[int] = []
    held = 0
    for row in torch.randperm(len(lengths), generator=generator).tolist():
        pool.append(row)
        held += lengths[row]
        if held >= POOL * tokens:
            packs += first_fit(pool, lengths, tokens)
            pool, held = [], 0
    packs += first_fit(pool, lengths, tokens)
    shuffled = torch.randperm(len(packs), generator=generator).tolist()
    return [packs[at] for at in shuffled]


@dataclass(frozen=True)
class Packs:
    """The rows of every step of a run: up to `tokens` tokens in each of `steps`; see `Batches`.

    Micro-batches are packs of up to `max_tokens`, or whole steps; where `padded`, for a model that
    takes no packs, they are rows of like length, of as many tokens with their padding. All epochs
    have as many steps: where one would need fewer, its packs of the most rows are halved. After
    `epochs` different orders the first one comes again.
    """

    lengths: Sequence[int]
    tokens: int
    steps_per_epoch: int
    epochs: int
    steps: int
    seed: int
    max_tokens: int | None = None
    padded: bool = False

    @classmethod
    def plan(
        cls,
        lengths: Sequence[int],
        *,
        tokens: int,
        epochs: float,
        max_steps: int | None,
        seed: int,
        max_tokens: int | None = None,
        padded: bool = False,
    ) -> "Packs":
        """`epochs` passes over the rows, or `max_steps` steps where that is less."""
        most = orders = 0
        while orders < epochs and (max_steps is None or orders * most < max_steps):
            most = max(most, len(packs_of_epoch(lengths, tokens, _seed(seed, orders))))
            orders += 1
        steps = ceil(epochs * most)
        steps = min(steps, max_steps or steps)
        return cls(lengths, tokens, most, orders, steps, seed, max_tokens, padded)

    @classmethod
    def of(cls, train: TrainSection, lengths: Sequence[int], padded: bool = False) -> "Packs":
        """Those that a recipe's section asks for, which packs, over rows of so many tokens each.

        Packs are of 1,024 tokens, or of the longest row, where it says nothing of them.
        """
        assert train.tokens is not None
        return cls.plan(
            lengths,
            tokens=train.tokens,
            epochs=train.epochs,
            max_steps=train.max_steps,
            seed=train.seed,
            max_tokens=train.max_tokens or max(PACK, *lengths),
            padded=padded,
        )

    def __iter__(self) -> Iterator[list[list[int]]]:
        """The micro-batches of each step: row indices of at most `tokens` together."""
        return self.since(1)

    def endless(self) -> Iterator[list[list[int]]]:
        """The micro-batches of each step, epoch after epoch without an end."""
        return replace(self, steps=2**62).since(1)

    def since(self, step: int) -> Iterator[list[list[int]]]:
        """The micro-batches of each step from the given one (1 is the first) to the last."""
        for rows in _walk(step, self.steps, self.steps_per_epoch, self._epoch):
            most = self.max_tokens or self.tokens
            if self.padded:
                alike = sorted(rows, key=lambda row: -self.lengths[row])
                yield cut(alike, self.lengths, len(rows), most)
            else:
                yield first_fit(rows, self.lengths, most)

    def _epoch(self, epoch: int) -> list[list[int]]:
        packs = packs_of_epoch(self.lengths, self.tokens, _seed(self.seed, epoch % self.epochs))
        while len(packs) < self.steps_per_epoch:
            largest = max(range(len(packs)), key=lambda at: len(packs[at]))
            middle = len(packs[largest]) // 2
            packs[largest : largest + 1] = packs[largest][:middle], packs[largest][middle:]
        return packs


Steps = Batches | Packs


def steps_of(train: TrainSection, lengths: Sequence[int], packs: bool = True) -> Steps:
    """The steps that a recipe's section asks for, over rows of so many tokens each.

    Where packs are asked for and the model takes none, without `packs`, they hold the same rows.
    """
    if train.packs:
        return Packs.of(train, lengths, padded=not packs)
    return Batches.of(train, lengths)
