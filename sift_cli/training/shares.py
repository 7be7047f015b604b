"""Which rows of a step each rank computes: dealt by tokens, so that all end at about one time."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from sift_cli.models.dropout import masks_of
from sift_cli.runs.session import Session
from sift_cli.tasks.token_batches import rows_of
from sift_cli.tasks.tokens import cut
from sift_cli.training.batches import first_fit


@dataclass(frozen=True)
class Share:
    """The rows that a rank computes at once: of the micro-batch `rows`, those at `own` (sorted).

    Where `laid_out`, they are padded, and their dropout is drawn, as in the whole micro-batch.
    A rank with no row takes the first one, and it does not count: `counts` is False.
    """

    rows: Sequence[int]
    own: Sequence[int]
    laid_out: bool = False
    counts: bool = True

    @property
    def whole(self) -> bool:
        """Whether it is all of the micro-batch."""
        return len(self.own) == len(self.rows)

    def batch(self, session: Session) -> Mapping[str, Tensor]:
        """The rows with what the loss needs."""
        assert session.train is not None
        if self.whole or not self.laid_out:
            return session.collate(session.train.take([self.rows[at] for at in self.own]))
        return rows_of(session.collate(session.train.take(self.rows)), self.own)

    def masks(self) -> AbstractContextManager[None]:
        """Within it, dropout is that of these rows in the micro-batch."""
        shared = self.laid_out and not self.whole
        return masks_of(self.own, len(self.rows)) if shared else nullcontext()


def shares_of(
    session: Session, rows: Sequence[Sequence[int]], alike: bool = False
) -> Iterator[Share]:
    """What this rank computes of a step's micro-batches, one after the other.

    With one process, these are the micro-batches. Padded rows on a CPU are dealt within each, which
    every rank walks through, so that random numbers are those of one process; so are all padded
    ones that are to be `alike`, where padding counts. Others are dealt over the whole step and put
    together anew, in micro-batches no larger than the step's.
    """
    ranks = session.ranks
    if ranks.alone:
        yield from (Share(part, range(len(part)), counts=ranks.main) for part in rows)
        return
    assert session.train is not None
    lengths = session.train.lengths
    if session.one_dropout or (alike and not session.task.packs):
        for part in rows:
            own = deal([lengths[row] for row in part], ranks.world)[ranks.rank]
            yield Share(part, own or [0], laid_out=True, counts=bool(own))
        return
    step = [row for part in rows for row in part]
    hands = deal([lengths[row] for row in step], ranks.world)
    parts = [_put_together(session, rows, [step[at] for at in hand]) for hand in hands]
    yield from (Share(one, range(len(one))) for one in parts[ranks.rank])
    for _ in range(len(parts[ranks.rank]), max(map(len, parts)) if ranks.even else 1):
        yield Share(step, [0], counts=False)


def _put_together(
    session: Session, rows: Sequence[Sequence[int]], own: list[int]
) -> list[list[int]]:
    """Some rows of a step in micro-batches no larger than the step's."""
    assert session.train is not None
    lengths = session.train.lengths
    if not own:
        return []
    if session.task.packs:
        return [*first_fit(own, lengths, max(sum(lengths[r] for r in part) for part in rows))]
    most = max(len(part) * max(lengths[row] for row in part) for part in rows)
    longest_first = sorted(own, key=lambda row: -lengths[row])
    return [*cut(longest_first, lengths, max(map(len, rows)), most)]


def deal(weights: Sequence[int], world: int) -> list[list[int]]:
    """The places of things so heavy for each of `world`, sorted: heavy first, to the lightest."""
    hands: list[list[int]] = [[] for _ in range(world)]
    load = [0] * world
    for at in sorted(range(len(weights)), key=lambda at: -weights[at]):
        lightest = min(range(world), key=load.__getitem__)
        hands[lightest].append(at)
        load[lightest] += weights[at]
    return [sorted(hand) for hand in hands]
