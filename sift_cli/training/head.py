"""What a new head starts from: random numbers, the prior of the labels, or a probe of features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from sift_cli.errors import SiftError
from sift_cli.models.names import architecture_of, head_of
from sift_cli.recipe import TrainSection
from sift_cli.runs.session import Session
from sift_cli.sparse import Support, Touched
from sift_cli.sparse.local import local_of, whole_of
from sift_cli.tasks.evaluation import collect
from sift_cli.tasks.task import Task
from sift_cli.tasks.tokens import Encoded

# Rows of a probe: several times the width of most features, for about 20 steps' worth of time.
ROWS = 2048
FOLDS = 5
PENALTIES = tuple(10.0**power for power in range(6))  # tried; see `Readout`


@dataclass(frozen=True)
class Readout:
    """A linear layer, fp64: `weight` [outputs, inputs], `bias` [outputs], None where it has none.

    `fit` standardises the features and folds that back. It is scikit-learn's logistic or ridge
    regression; `penalty` is 1 / C of the one and alpha of the other.
    """

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, layer: nn.Linear) -> "Readout":
        """What a layer holds."""
        bias = None if layer.bias is None else whole_of(layer.bias).double().cpu()
        return cls(whole_of(layer.weight).double().cpu(), bias)

    @classmethod
    def fit(
        cls,
        features: Tensor,
        targets: Tensor,
        outputs: int,
        penalty: float,
        bias: bool,
        weights: Tensor | None = None,
    ) -> "Readout":
        """Fits features ([N, inputs]) to targets: codes of classes or numbers, [N], or 0 and 1 for
        each of several labels, [N, outputs].

        `weights` ([N]) are what rows count, 1 unless given. A class without rows gets no weights,
        and a bias as if it had half a row.
        """
        wide = features.double()
        mean = wide.mean(0) if bias else torch.zeros(wide.shape[1], dtype=wide.dtype)
        scale = (wide - mean).square().mean(0).sqrt()
        scale = torch.where(scale > 1e-6 * scale.max(), scale, torch.ones_like(scale))
        standard = ((wide - mean) / scale).numpy()
        if targets.dim() == 2:
            each = [_label(standard, column, penalty, bias) for column in targets.T]
            weight, offset = (torch.stack(some) for some in zip(*each, strict=True))
        elif targets.is_floating_point():
            from sklearn.linear_model import Ridge

            ridge = Ridge(alpha=penalty, fit_intercept=bias).fit(standard, targets.numpy())
            weight, offset = torch.tensor(ridge.coef_)[None], torch.tensor([ridge.intercept_])
        else:
            weight, offset = _classes(standard, targets, outputs, penalty, bias, weights)
        weight = weight / scale
        return cls(weight, offset - weight @ mean if bias else None)

    def __call__(self, features: Tensor) -> Tensor:
        """Outputs [N, outputs]."""
        outputs: Tensor = F.linear(features.double(), self.weight, self.bias)
        return outputs

    def loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """The loss of each row, [N]; see `losses`."""
        return losses(self(features), targets)


def start_head(settings: TrainSection, session: Session, console: Console) -> Touched | None:
    """Starts a new head as `train.head_start` says; the random numbers that it held before.

    A head that the checkpoint held stays as it is, and so does all else. Raises SiftError where the
    task or the model has no such head, but for `auto`, which then leaves it random.
    """
    start = settings.head_start
    if start != "auto":
        return _start(start, settings, session, console)
    if not session.new:
        return None
    try:
        return _start("probe", settings, session, console)
    except SiftError as error:
        console.print(f"head: stays as it is ({error})", highlight=False)
        return None


def _start(
    start: str, settings: TrainSection, session: Session, console: Console
) -> Touched | None:
    if start == "random":
        return None
    name = head_layer(start, session.model)
    assert session.train is not None
    targets = targets_for(start, session.task, session.train)
    layer: Any = session.model.get_submodule(name)
    own = {f"{name}.{key}": weight for key, weight in layer.named_parameters()}
    if not own.keys() <= {*session.new}:
        console.print(f"head: {name} is trained already and stays as it is", highlight=False)
        return None
    touched = Touched()
    for key, weight in own.items():
        whole, shards = Support(tuple(weight.shape)), session.shards
        touched.add(key, whole if shards is None else shards.local(whole), local_of(weight))
    weights = session.task.row_weights(session.train)
    if start == "prior":
        said = _prior(layer, targets, weights, session)
    else:
        said = _probe(layer, targets, weights, session, settings)
    console.print(f"head: {said}", highlight=False)
    return touched


def targets_for(start: str, task: Task, data: Encoded) -> Tensor:
    """What a head that begins as `start` is to give; raises SiftError where rows have no label."""
    targets = task.targets(data)
    if targets is None:
        raise _no_row_head(start, task)
    return targets


def _no_row_head(start: str, task: Task) -> SiftError:
    return SiftError(
        f"train.head_start: {start} needs a head that gives a row's label, and the task "
        f"{task.name} has none; set it to random"
    )


def start_of(settings: TrainSection, task: Task, model: nn.Module) -> str:
    """What a new head of this model starts from, by `train.head_start`: random, probe or prior.

    Raises SiftError where it cannot.
    """
    start = settings.head_start
    if start == "random":
        return start
    try:
        head_layer("probe" if start == "auto" else start, model)
        if not task.row_head:
            raise _no_row_head(start, task)
    except SiftError:
        if start != "auto":
            raise
        return "random"
    return "probe" if start == "auto" else start


def head_layer(start: str, model: nn.Module) -> str:
    """The name of the linear layer that makes a model's outputs: the last one beside its base.

    Raises SiftError where there is none, or where it has no bias for the start `prior`.
    """
    modules = dict(model.named_modules())
    owners = dict.fromkeys(name.rpartition(".")[0] for name in head_of(model))
    linear = [owner for owner in owners if isinstance(modules[owner], nn.Linear)]
    if not linear:
        raise SiftError(f"train.head_start: {start}: {architecture_of(model)} has no linear head")
    if start == "prior" and modules[linear[-1]].bias is None:
        raise SiftError(
            f"train.head_start: prior is a bias, and {linear[-1]} of {architecture_of(model)} has "
            "none; use probe or random"
        )
    return linear[-1]


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each row, [N]: cross-entropy of codes, the squared error of numbers.

    Of several labels ([N, outputs]) the mean of their binary cross-entropies.
    """
    if targets.dim() == 2:
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)
    if targets.is_floating_point():
        return torch.square(outputs[:, 0] - targets)
    return F.cross_entropy(outputs, targets, reduction="none")


def prior(targets: Tensor, outputs: int, weights: Tensor | None = None) -> Tensor:
    """The best constant output, fp64 [outputs]: log frequencies of classes, or the mean number.

    Of several labels ([N, outputs]) the log odds of each.
    `weights` ([N]) are what rows count, 1 unless given. A class without rows counts as half a row.
    """
    if targets.dim() == 2:
        return torch.stack([_log_odds(column) for column in targets.T])
    if targets.is_floating_point():
        return targets.double().mean().view(1)
    counts = torch.bincount(targets, weights, minlength=outputs).double()
    return (counts.clamp_min(0.5) / counts.sum()).log()


def sample(targets: Tensor, seed: int, most: int = ROWS) -> list[int]:
    """So many rows at most, in a seeded order; each class that has rows comes once at the front."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed)).numpy()
    if targets.is_floating_point():
        return [int(row) for row in order[:most]]
    _, first = np.unique(targets.numpy()[order], return_index=True)
    front = np.sort(first)
    rows = np.concatenate([order[front], np.delete(order, front)])
    return [int(row) for row in rows[: max(most, len(front))]]


def choose_penalty(
    features: Tensor, targets: Tensor, outputs: int, bias: bool, weights: Tensor | None = None
) -> float:
    """The one of PENALTIES with the lowest loss on rows that were not fitted, over five folds.

    Rows, which count `weights` ([N]), are in the order of `sample`, whose front is always fitted.
    """
    weights = torch.ones(len(targets), dtype=torch.float64) if weights is None else weights
    kept = 0 if targets.is_floating_point() else len(targets.unique())
    fold = torch.arange(len(targets)) % FOLDS
    fold[:kept] = -1
    totals = dict.fromkeys(PENALTIES, 0.0)
    for at in range(FOLDS):
        out, rest = fold == at, fold != at
        if not bool(out.any()) or int(rest.sum()) < 2:
            continue
        for penalty in PENALTIES:
            fitted = Readout.fit(
                features[rest], targets[rest], outputs, penalty, bias, weights[rest]
            )
            losses_out = fitted.loss(features[out], targets[out]) * weights[out]
            totals[penalty] += float(losses_out.sum())
    return min(reversed(PENALTIES), key=lambda penalty: totals[penalty])


def features_of(layer: nn.Linear, session: Session, rows: Sequence[int]) -> Tensor:
    """What the layer reads where it makes each row's output, fp32 [N, inputs], in evaluation mode.

    The layer gives the number of the input in place of its output, so what the model puts out tells
    which of a row's tokens it takes. Raises SiftError where these are no such numbers.
    """
    read: list[Tensor] = []

    def number(_: nn.Module, given: tuple[Tensor], made: Tensor) -> Tensor:
        read[:] = [given[0].reshape(-1, given[0].shape[-1])]
        numbers = torch.arange(len(read[0]), device=made.device, dtype=torch.float32)
        return numbers.view(*made.shape[:-1], 1).expand(made.shape)

    def features(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        numbers = session.task.outputs(model, batch)
        places = numbers[:, 0].long()
        exact = numbers.dtype == torch.float32 and bool((numbers == places[:, None]).all())
        if not exact or not bool(((places >= 0) & (places < len(read[0]))).all()):
            raise SiftError(
                "train.head_start: what the model puts out is not what its last linear layer "
                "gives, so nothing can be fitted; use prior or random"
            )
        return read[0][places]

    assert session.train is not None
    hook = layer.register_forward_hook(number)
    try:
        return collect(
            features,
            session.model,
            session.train,
            rows,
            session.collate,
            batch_size=session.eval_batch_size,
            max_tokens=session.eval_max_tokens,
            bf16=session.bf16,
            each=session.ranks.each,
        )
    finally:
        hook.remove()


@torch.no_grad()
def _prior(layer: nn.Linear, targets: Tensor, weights: Tensor | None, session: Session) -> str:
    """Sets the bias; says what that alone gives."""
    best = prior(targets, layer.out_features, weights)
    before, after = (
        _mean(losses(bias.expand(len(targets), -1), targets), weights)
        for bias in (whole_of(layer.bias).double().cpu(), best)
    )
    _fill(layer.bias, best, session)
    return f"bias at the prior of {len(targets):,} rows; its loss alone {before:.4f} -> {after:.4f}"


def _mean(values: Tensor, weights: Tensor | None) -> float:
    """The mean of what rows give ([N]), by what they count."""
    return float(values.mean() if weights is None else (values * weights).sum() / weights.sum())


@torch.no_grad()
def _probe(
    layer: nn.Linear,
    targets: Tensor,
    weights: Tensor | None,
    session: Session,
    settings: TrainSection,
) -> str:
    """Fits weight and bias to the features of a sample; says what that gives."""
    rows = sample(targets, settings.seed)
    features, wanted = features_of(layer, session, rows), targets[rows]
    count = None if weights is None else weights[rows]
    width, bias = layer.out_features, layer.bias is not None

    def fit() -> tuple[float, Readout]:
        with threadpool_limits(1, "blas"):  # small products: threads would wait for each other
            penalty = choose_penalty(features, wanted, width, bias, count)
            return penalty, Readout.fit(features, wanted, width, penalty, bias, count)

    penalty, found = session.ranks.as_one(fit)
    before, after = (_mean(one.loss(features, wanted), count) for one in (Readout.of(layer), found))
    _fill(layer.weight, found.weight, session)
    if found.bias is not None:
        _fill(layer.bias, found.bias, session)
    return (
        f"a probe of {len(rows):,} rows (penalty {penalty:g}); loss on them {before:.4f} -> "
        f"{after:.4f}"
    )


def _fill(weight: Tensor, values: Tensor, session: Session) -> None:
    """Writes a weight's values, of which there may be some rows here."""
    shards = session.shards
    local_of(weight).copy_(values if shards is None else shards.local_rows(values))


def _log_odds(held: Tensor) -> Tensor:
    """Those of a label that rows hold (1) or not (0), [N]; one side has half a row at least."""
    count = held.double().sum().clamp(0.5, len(held) - 0.5)
    return (count / (len(held) - count)).log()


def _label(
    standard: "np.ndarray[Any, Any]", held: Tensor, penalty: float, bias: bool
) -> tuple[Tensor, Tensor]:
    """Weight and bias ([inputs], []) of a logistic regression to whether rows hold a label, [N]."""
    from sklearn.linear_model import LogisticRegression

    if bool((held == held[0]).all()):
        return torch.zeros(standard.shape[1], dtype=torch.float64), _log_odds(held)
    fitted = LogisticRegression(C=1 / penalty, fit_intercept=bias, max_iter=1000)
    fitted.fit(standard, held.long().numpy())
    return torch.tensor(fitted.coef_[0]).double(), torch.tensor(fitted.intercept_).double().view(())


def _classes(
    standard: "np.ndarray[Any, Any]",
    targets: Tensor,
    outputs: int,
    penalty: float,
    bias: bool,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weight and bias ([outputs, inputs], [outputs]) of a logistic regression."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=1 / penalty, fit_intercept=bias, max_iter=1000)
    fitted.fit(standard, targets.numpy(), None if weights is None else weights.numpy())
    own, offset = torch.tensor(fitted.coef_), torch.tensor(fitted.intercept_)
    if len(own) == 1:  # two classes: sklearn has the difference of their outputs
        own, offset = torch.cat([-own, own]) / 2, torch.cat([-offset, offset]) / 2
    known = torch.as_tensor(fitted.classes_)
    weight = torch.zeros(outputs, standard.shape[1], dtype=own.dtype)
    total = F.linear(torch.as_tensor(standard), own, offset).logsumexp(1).mean()
    bias_of_all = (total + log(0.5 / len(targets))).repeat(outputs)
    weight[known], bias_of_all[known] = own, offset
    return weight, bias_of_all
