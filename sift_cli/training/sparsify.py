"""Sparse training in a loop of the caller's own: which entries, their optimizer, their delta."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor, nn

from sift_cli.delta.attached import Attached, attached_to
from sift_cli.delta.build import describe_base
from sift_cli.errors import SiftError
from sift_cli.models.fingerprints import dtype_name, state_fingerprints
from sift_cli.models.loading import model_folder
from sift_cli.models.prepare import frozen
from sift_cli.models.stored import Stored
from sift_cli.recipe import SelectionSection, selection_of, usual_rate
from sift_cli.selection.evidence import NEED_DATA
from sift_cli.selection.policies import COMPARING, POLICIES
from sift_cli.selection.scale import input_scales
from sift_cli.selection.select import planned, select
from sift_cli.sparse import SparseParameters, attach
from sift_cli.sparse.coordinates import Coordinates
from sift_cli.sparse.parameters import whole_supports
from sift_cli.sparse.standalone import FlatAdamW
from sift_cli.training.parts import Parts, descent_rate, rule_of
from sift_cli.training.randomness import kept_randomness
from sift_cli.training.rates import at_width, width_in

Batch = Mapping[str, Any]  # what the model takes by name, labels among it
Gradients = Mapping[str, Tensor | None]  # by parameter name, each in its weight's shape
IN_MEMORY = "(a model in memory)"  # the base's path in a delta, where the model came from no folder
OF_GRADIENTS = {"gradient", "gradient_squares"}  # the evidence that gradients alone are


class Sparse(NamedTuple):
    """What `sparsify` gives: the entries that train, and the optimizer over them.

    `parameters.flat` is the one torch parameter to train, with its `.grad`; `parameters.detach()`
    gives the model its own forward passes back.
    """

    parameters: SparseParameters
    optimizer: FlatAdamW


def sparsify(
    model: nn.Module,
    batch_or_gradients: Batch | Iterable[Batch] | Gradients | None = None,
    *,
    density: float | Mapping[str, float] | None = None,
    policy: str = "sift",
    lr: float | None = None,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    seed: int = 42,
    base: str | None = None,
    allow_code: bool = False,
    **selection: Any,
) -> Sparse:
    """Makes the best entries of a model the only ones that train, for a loop of your own.

    `model` lies on its device and holds the base's weights; nothing but forward passes and
    `requires_grad` flags changes. Entries are ranked by a batch of what the model takes (with
    labels, so that it gives a loss), or by the first ones of several, such as a data loader, as
    many as the policy looks at; or by gradients that you have, by parameter name. Policies that
    look at no data (`random`, `magnitude`) need neither. `density`, `policy` and `selection` are
    keys of a recipe's section `selection`, with its defaults but for the policy, which is that of
    one batch. Parameters that the base lacks, such as a new head, train whole.

    The optimizer's rate is the usual one of `sift train` unless `lr` says another; it clips by
    itself, to `max_grad_norm`. `base` is the folder or hub id that the model was loaded from, if it
    does not say so itself. `Delta.of(model)` is the change at any time.

    Raises SiftError for what does not fit the model, a policy that chooses anew while it trains, or
    one that looks at more than was given.
    """
    if not isinstance(model, nn.Module):
        raise SiftError(f"sparsify: model: give a torch.nn.Module, got {type(model).__name__}")
    if attached_to(model) is not None:
        raise SiftError("sparsify: the model has been through it already; load the base anew")
    section = selection_of({"policy": policy, "density": density, **selection})
    if section.schedule != "first-batch":
        raise SiftError(
            f"sparsify: {policy} chooses by the schedule {section.schedule}, as `sift train` can; "
            "give schedule='first-batch', or another policy"
        )
    path, revision, new = _origin(model, base)
    rule = rule_of(section, allow_code)
    parts = Parts.of(section, model, new, rule)
    device = next(model.parameters()).device
    rate = lr or _usual_rate(section, model, parts)
    marks = state_fingerprints(model, new)
    model.zero_grad(set_to_none=True)  # what is left there would be added to
    descent = descent_rate(section, rate, model, parts) if rule.score.descends else 0.0
    with frozen(model), kept_randomness(device):
        passes, scales = _looks(model, batch_or_gradients, section, parts)
        chosen = select(
            model,
            parts.sparse,
            parts.rule,
            seed=seed,
            backward=passes,
            descent_rate=descent,
        )
    supports = chosen | whole_supports(model, [*parts.vectors, *parts.dense])
    if not supports:
        raise SiftError("sparsify: no gradient reaches a weight that selection.target names")
    parameters = attach(model, supports, coordinates=scales)
    dtype = dtype_name(next(model.parameters()).dtype)
    Attached(parameters, new, marks, describe_base(model, path, revision, dtype), policy).keep()
    optimizer = FlatAdamW(parameters, rate, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    return Sparse(parameters, optimizer)


def _usual_rate(section: SelectionSection, model: nn.Module, parts: Parts) -> float:
    """That of the policy, of the share of entries that train, and of the model's width."""
    share = section.density
    if not isinstance(share, float):
        named = dict(model.named_parameters())
        chosen = sum(planned(model, parts.sparse, parts.rule).values())
        share = chosen / sum(named[name].numel() for name in parts.sparse)
    narrow = usual_rate(share, POLICIES[section.policy].pace)
    return at_width(narrow, width_in(getattr(model, "config", None)))


def _origin(model: nn.Module, base: str | None) -> tuple[str, str | None, tuple[str, ...]]:
    """Where the base lies, its commit on the hub, and the names of the parameters it lacks."""
    config = getattr(model, "config", None)
    path = base or getattr(config, "_name_or_path", "")
    if not path:
        return IN_MEMORY, None, ()
    revision = None if base else getattr(config, "_commit_hash", None)
    stored = Stored(model_folder(path, revision), model)
    new = (
        name
        for name, weight in model.named_parameters()
        if name not in stored.places or stored.shape(name) != list(weight.shape)
    )
    return path, revision, tuple(new)


def _looks(
    model: nn.Module, given: object, section: SelectionSection, parts: Parts
) -> tuple[list[Callable[[], object]], Coordinates]:
    """The backward passes by which entries are ranked, not run yet, and the policy's step scales.

    Raises SiftError where what is given is of a wrong kind, or is not all that the score looks at.
    """
    score, named = parts.rule.score, dict(model.named_parameters())
    scaled = POLICIES[section.policy].train.get("step_scale") == "input"
    if isinstance(given, Mapping) and named.keys() & given.keys():
        if scaled or section.score in COMPARING or score.needs & NEED_DATA - OF_GRADIENTS:
            raise SiftError(f"sparsify: {section.policy} looks at more than that; give batches")
        _require_gradients(given, named)
        return [partial(_hand_in, given, named)], Coordinates()
    batches = _batches(given, section.batches)
    if section.score in COMPARING and len(batches) < 2:
        raise SiftError(f"sparsify: {section.policy} compares batches; give at least 2 in a list")
    if scaled and not batches:
        raise SiftError(f"sparsify: {section.policy} looks at batches; give one")
    passes: list[Callable[[], object]] = [partial(_backward, model, one) for one in batches]
    forward = [partial(_loss, model, one) for one in batches] if scaled else []
    return passes, Coordinates(input_scales(model, parts.sparse, forward))


def _require_gradients(given: Mapping[str, object], named: Mapping[str, Tensor]) -> None:
    for name, gradient in given.items():
        if name not in named:
            raise SiftError(f"sparsify: gradients: the model has no parameter {name}")
        if gradient is None:
            continue
        shape = getattr(gradient, "shape", None)
        if shape != named[name].shape:
            raise SiftError(
                f"sparsify: gradients: {name} is of shape {list(named[name].shape)}; its gradient "
                f"is {type(gradient).__name__ if shape is None else f'of {list(shape)}'}"
            )


def _batches(given: object, most: int) -> list[Batch]:
    """The first batches of what is given, at most `most`."""
    if given is None:
        return []
    several = [given] if isinstance(given, Mapping) or not isinstance(given, Iterable) else given
    batches = list(islice(several, most))
    for one in batches:
        if not isinstance(one, Mapping):
            raise SiftError(
                "sparsify: give a batch (a dict of what the model takes), several, or gradients by "
                f"parameter name; got {type(one).__name__}"
            )
    return batches


def _hand_in(gradients: Gradients, named: Mapping[str, nn.Parameter]) -> None:
    """A backward pass that brings gradients which are there already."""
    for name, gradient in gradients.items():
        if gradient is not None and named[name].requires_grad:
            named[name].backward(gradient.detach().to(named[name]))


def _backward(model: nn.Module, batch: Batch) -> None:
    _loss(model, batch).backward()


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss of a batch. Raises SiftError where it gives none."""
    device = next(model.parameters()).device
    here = {k: one.to(device) if isinstance(one, Tensor) else one for k, one in batch.items()}
    loss = getattr(model(**here), "loss", None)
    if not isinstance(loss, Tensor):
        raise SiftError(
            "sparsify: the model gives no loss for this batch; put labels into it, or run your own "
            "loss backward and give the gradients by parameter name"
        )
    return loss
