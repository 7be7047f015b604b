"""From scores to supports, one dense gradient at a time."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from sift_cli.selection.budget import Global, PerTensor, allot, share
from sift_cli.selection.scores import SCORES, Score, score_entries
from sift_cli.sparse import Support


def select(
    weights: Mapping[str, nn.Parameter],
    *,
    score: str,
    scope: str,
    density: float | None = None,
    budget: int | None = None,
    seed: int = 0,
    backward: Sequence[Callable[[], object]] = (),
) -> dict[str, Support]:
    """The entries of `weights` (name -> parameter) to train, on the host.

    `score` and `scope` name rows of the tables; exactly one of `density` (share of each weight, or
    of all together under scope `global`) and `budget` (entries in all) is given. Each callable in
    `backward` runs one calibration batch forward and backward; with one batch each gradient is
    scored and freed as it arrives, with several their sum gathers on the host. A weight that the
    loss does not depend on has no gradient to rank and is left out. Raises SiftError where a score
    is not finite or the budget does not fit.
    """
    sizes = {name: weight.numel() for name, weight in weights.items()}
    chooser = _chooser(scope, density, budget, sizes)
    row = SCORES[score]
    if row.needs_gradient:
        _score_gradients(weights, row, chooser, seed, backward)
    else:
        for name, weight in weights.items():
            scores = score_entries(row, name, weight, None, seed)
            chooser.add(name, tuple(weight.shape), scores)
    return chooser.supports()


def _chooser(
    scope: str, density: float | None, budget: int | None, sizes: Mapping[str, int]
) -> PerTensor | Global:
    if scope == "global":
        total = sum(sizes.values())
        count = share(density, total) if density is not None else budget
        assert count is not None
        return Global(sum(allot(count, sizes).values()))
    if density is not None:
        return PerTensor({name: share(density, size) for name, size in sizes.items()})
    assert budget is not None
    return PerTensor(allot(budget, sizes))


def _score_gradients(
    weights: Mapping[str, nn.Parameter],
    row: Score,
    chooser: PerTensor | Global,
    seed: int,
    backward: Sequence[Callable[[], object]],
) -> None:
    """Runs the calibration batches; hooks take each gradient away as soon as it is there."""
    sums: dict[str, Tensor] = {}

    def settle(name: str, weight: nn.Parameter, gradient: Tensor) -> None:
        chooser.add(name, tuple(weight.shape), score_entries(row, name, weight, gradient, seed))

    def take(name: str, weight: nn.Parameter) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        if len(backward) == 1:
            settle(name, weight, gradient)
        elif name in sums:
            sums[name] += gradient.to("cpu", sums[name].dtype)
        else:
            sums[name] = gradient.to("cpu").float()

    flags = {name: weight.requires_grad for name, weight in weights.items()}
    handles = []
    for name, weight in weights.items():
        weight.requires_grad_(True)
        handles.append(
            weight.register_post_accumulate_grad_hook(lambda w, name=name: take(name, w))
        )
    try:
        for run in backward:
            run()
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in weights.items():
            weight.requires_grad_(flags[name])
    for name in list(sums):
        settle(name, weights[name], sums.pop(name))
