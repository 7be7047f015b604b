"""What a probe has measured, as probe.json holds it."""

from collections.abc import Callable
from math import sqrt
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from sift_cli.analysis.masks import CURVE, TrackedGradient, TrackedMask
from sift_cli.recipe import Recipe


def kind(name: str) -> str:
    """The name of a weight without layer numbers, in its last parts: `self.query`."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts[-3:-1]) + (" bias" if parts[-1] == "bias" else "")


def findings_of(
    recipe: Recipe,
    steps: int,
    seen: TrackedGradient,
    masks: dict[str, TrackedMask],
    classes: dict[str, dict[str, Tensor]],
) -> dict[str, Any]:
    """Everything that was measured, as probe.json holds it."""
    curves = {
        f"step {step}": {
            "overall": _curve(seen, step, lambda name: True),
            **{
                one: _curve(seen, step, lambda name, one=one: kind(name) == one)  # type: ignore[misc]
                for one in sorted({kind(name) for name in seen.curve[step]})
            },
        }
        for step in seen.curve
    }
    rate = recipe.train.rate
    later = {
        name: {
            **_along(mask.kept),
            "entries": sum(len(mask.supports[n]) for n in mask.supports if n in seen.sizes),
            "replaced_per_step": mean(mask.replaced or [0.0]),
            "second_moment_lost_per_step": mean(mask.lost or [0.0]),
            "bias_energy_share": _along(mask.bias.steps),
            "output_step": {
                "mean": rate * mean(mask.moves.values() or [0.0]),
                "layers": {weight: rate * far for weight, far in mask.moves.items()},
            },
        }
        for name, mask in masks.items()
    }
    found: dict[str, Any] = {
        "task": recipe.data.task,
        "model": recipe.model.path,
        "policy": recipe.selection.policy,
        "density": recipe.selection.density,
        "budget": recipe.selection.budget,
        "steps": steps,
        "seed": recipe.train.seed,
        "learning_rate": rate,
        "curve": {"densities": list(CURVE), "norm_share": curves},
        "kept_norm_share": later,
        "bias_energy_share": _along(seen.bias.steps),
        "overlap": {
            "with_first_batch": _overlaps(seen),
            "with_batch_before": [1 - gone for gone in masks["current-batch"].replaced],
            "between_classes": _between(classes),
        },
    }
    found["says"] = _sentences(found)
    return found


def _along(steps: list[float]) -> dict[str, Any]:
    """A number of each step, and its first, last, and mean over all but the first."""
    later = mean(steps[1:] or steps)
    return {"first": steps[0], "mean": later, "last": steps[-1], "steps": steps}


def _curve(seen: TrackedGradient, step: int, chosen: Callable[[str], bool]) -> list[float]:
    names = [name for name in seen.curve[step] if chosen(name)]
    whole = sum(seen.whole[step][name] for name in names) or 1.0
    tops = zip(*(seen.curve[step][name] for name in names), strict=True)
    return [sqrt(sum(top) / whole) for top in tops]


def _overlaps(seen: TrackedGradient) -> list[float]:
    """For each step but the first, the share of its mask that the first batch's mask holds."""
    return [
        sum(common for _, common in counts) / sum(size for size, _ in counts)
        for step, counts in seen.alike.items()
        if step > 1
    ]


def _between(classes: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    return {
        one: {
            other: sum(
                int(torch.isin(mask, classes[other][name]).sum()) for name, mask in masks.items()
            )
            / sum(map(len, masks.values()))
            for other in classes
        }
        for one, masks in classes.items()
    }


def _sentences(found: dict[str, Any]) -> list[str]:
    """What the numbers mean for this model and data, in four sentences."""
    kept = found["kept_norm_share"]
    first, current, random = (kept[name]["mean"] for name in ("sift", "current-batch", "random"))
    bias = {name: one["bias_energy_share"]["first"] for name, one in kept.items()}
    moves = {name: one["output_step"]["mean"] for name, one in kept.items()}
    place = CURVE.index(1e-2)
    shares = [step["overall"][place] for step in found["curve"]["norm_share"].values()]
    replaced = kept["current-batch"]["replaced_per_step"]
    lost = kept["current-batch"]["second_moment_lost_per_step"]
    how = (
        f"far above what a random mask keeps ({random:.0%})"
        if first > 2 * random
        else f"little more than what a random mask keeps ({random:.0%})"
    )
    return [
        f"The top 1 % of each weight's entries hold {shares[0]:.0%} of the first gradient's norm "
        f"and {shares[-1]:.0%} of the last one's ({shares[0] ** 2:.0%} and "
        f"{shares[-1] ** 2:.0%} of its energy).",
        f"Up to step {found['steps']} the first batch's mask keeps {first:.0%} of each later "
        f"gradient's norm, {first / max(current, 1e-12):.0%} of what the current batch's mask "
        f"keeps ({current:.0%}) and {how}.",
        f"A mask chosen anew for every batch replaces {replaced:.0%} of its entries at each step "
        f"and throws away {lost:.0%} of the second moment that Adam has gathered; a mask that "
        "stays throws away none.",
        f"Of what the first batch's mask keeps of the first gradient's energy, a bias could do "
        f"{bias['sift']:.0%} (random mask: {bias['random']:.0%}, whole gradient: "
        f"{found['bias_energy_share']['first']:.0%}); one step at {found['learning_rate']:g} moves "
        f"the outputs of a layer by {moves['sift']:.1%} (random mask: {moves['random']:.1%}).",
    ]
