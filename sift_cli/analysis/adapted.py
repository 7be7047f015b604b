"""One training by a method that is not sift's, for comparison: what differs is what trains.

All else is the loop of `sift train`. Run as a process of its own:
python -m sift_cli.analysis.adapted METHOD RECIPE OUT [DEVICE] [--devices N]
"""

import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from sift_cli.analysis.methods import (
    ADAPTERS,
    adapt,
    adapted_layers,
    rank_for,
    require_peft,
    trained,
    usual_rate_of,
)
from sift_cli.errors import SiftError
from sift_cli.recipe import Recipe, load_recipe
from sift_cli.runs.session import Session
from sift_cli.runs.summary import Summary
from sift_cli.system.launch import launch, launched
from sift_cli.training import train
from sift_cli.training.batches import Steps
from sift_cli.training.choosing import Chooser
from sift_cli.training.dense import Adapted, Dense
from sift_cli.training.parts import rule_of
from sift_cli.training.rates import share_of


def train_adapted(
    recipe: Recipe, method: str, out: Path, *, device: str | None = None, resume: bool = False
) -> Summary:
    """Trains with one of METHODS as `train` does with the recipe's policy."""
    return train(
        recipe,
        out,
        build=lambda resolved: partial(build, method, resolved),
        narrow=usual_rate_of(method, share_of(recipe), recipe.data.task),
        device=device,
        resume=resume,
    )


def build(method: str, recipe: Recipe, session: Session, batches: Steps) -> Dense:
    """The method on the session's model, at the size nearest to the recipe's selection."""
    rule, model, seed = rule_of(recipe.selection), session.model, recipe.train.seed
    chooser = Chooser.of(recipe.selection, recipe.train, session, batches, rule=rule)
    layers, rank = adapted_layers(model, chooser.sparse), None
    if method in ADAPTERS:
        budget = sum(chooser.parts.planned(model).values())
        rank, _ = rank_for(model, layers, budget)

    def ready() -> Adapted:
        named = dict(model.named_parameters())
        head = {id(named[name]) for name in chooser.dense}
        adapted = adapt(model, method, layers, chooser.dense, rank or 0, seed)
        weights = trained(adapted)
        whole = {name: one for name, one in weights.items() if id(one) in head}

        def save() -> Mapping[str, Tensor]:
            if method not in ADAPTERS:
                return weights
            own: Mapping[str, Tensor] = require_peft().get_peft_model_state_dict(adapted)
            return {**whole, **own}

        return Adapted(weights, save, rank)

    return Dense(method, recipe.train, session, chooser.dense, ready)


def main(arguments: list[str]) -> None:
    """The process: a user's mistake becomes a line and an exit code."""
    parser = ArgumentParser()
    parser.add_argument("method")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("device", nargs="?")
    parser.add_argument("--devices", type=int, default=1)
    given = parser.parse_args(arguments)
    if given.devices not in (1, launched().world):
        sys.exit(launch(given.devices, "sift_cli.analysis.adapted", arguments))
    try:
        recipe = load_recipe(given.recipe)
        train_adapted(recipe, given.method, given.out, device=given.device, resume=True)
    except SiftError as error:
        print(error, file=sys.stderr)
        sys.exit(int(error.code))


if __name__ == "__main__":
    main(sys.argv[1:])
