"""What of a model trains by a recipe's selection, and by which rule."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

from torch import nn

from sift_cli.recipe import Recipe, SelectionSection
from sift_cli.selection.scores import find_score
from sift_cli.selection.select import (
    Rule,
    beside,
    check,
    planned,
    require_by_rows,
)
from sift_cli.selection.targets import (
    choose_vectors,
    choose_weights,
)

SCALE_BATCHES = 8  # enough for root mean squares over their tokens
SCALE = "step_scale/"  # before a weight's name, in a checkpoint


def rule_of(selection: SelectionSection, allow_code: bool = False) -> Rule:
    """What the section says of score, scope, structure and size."""
    return Rule(
        score=find_score(selection.score or "gradient", allow_code),
        scope=selection.scope or "tensor",
        structure=selection.structure or "entry",
        density=selection.density,
        budget=selection.budget,
        block=selection.block_size or 1,
        rank=selection.rank or 32,
        balance=1.0 if selection.balance is None else selection.balance,
    )


def rule_in(recipe: Recipe, allow_code: bool = False) -> Rule:
    """That of a recipe. Raises SiftError where no rank could choose by it of its own rows."""
    rule = rule_of(recipe.selection, allow_code)
    if recipe.distributed.shard == "full":
        require_by_rows(rule)
    return rule


@dataclass(frozen=True)
class Parts:
    """What of a model trains: of `sparse` what `rule` chooses, `vectors` and `dense` whole.

    `vectors` (biases and norms) are counted in the budget, `dense` (the head) is not.
    """

    sparse: Sequence[str]
    vectors: Sequence[str]
    dense: Sequence[str]
    rule: Rule

    @classmethod
    def of(
        cls, selection: SelectionSection, model: nn.Module, new: Iterable[str], rule: Rule
    ) -> "Parts":
        """What the section says of this model, of which `new` names the parameters of no base.

        Raises SiftError where its patterns, densities, budgets or blocks do not fit the model.
        """
        sparse, dense = choose_weights(
            model, selection.target, selection.exclude, selection.dense, new
        )
        check(model, sparse, rule)
        vectors = choose_vectors(model, selection.exclude, dense) if selection.vectors else []
        sparse, rule = beside(model, sparse, vectors, rule)
        check(model, sparse, rule)
        return cls(sparse, vectors, dense, rule)

    @property
    def all(self) -> set[str]:
        """The names of all that trains."""
        return {*self.sparse, *self.vectors, *self.dense}

    def planned(self, model: nn.Module) -> dict[str, int]:
        """The entries of each weight that will train within the budget, from shapes alone."""
        named = dict(model.named_parameters())
        whole = {name: named[name].numel() for name in self.vectors}
        return planned(model, self.sparse, self.rule) | whole


def choices_of(selection: SelectionSection, rule: Rule, steps: int) -> list[int]:
    """How many batches each choice of entries looks at in a run of so many steps, in order."""
    if not rule.score.needs_data:
        return []
    return [min(selection.batches, steps - at) for at in range(0, steps, selection.period or steps)]


def descent_rate(selection: SelectionSection, rate: float, model: nn.Module, parts: Parts) -> float:
    """The rate of a sign descent: `selection.descent_rate`, or one that follows the training's.

    Where all of n entries move and not the k that train, steps are as long at sqrt(k / n) of the
    rate; of that a quarter, the better one of two that were tried (docs/log.md, 2026-11-28: 1e-4
    beside a rate of 4e-3 at 1 %, and 3e-5).
    """
    if selection.descent_rate is not None:
        return selection.descent_rate
    named = dict(model.named_parameters())
    sizes = sum(named[name].numel() for name in parts.sparse)
    chosen = sum(planned(model, parts.sparse, parts.rule).values())
    return rate * sqrt(chosen / sizes) / 4
