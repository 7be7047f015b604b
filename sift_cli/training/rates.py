"""`train.learning_rate: auto`: a few rates tried on training rows, and the best one taken."""

import json
import shutil
from collections.abc import Callable, Mapping
from math import ceil, inf, isfinite
from pathlib import Path

from rich.console import Console

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.loading import model_folder, read_config
from sift_cli.recipe import AUTO, Recipe
from sift_cli.runs.folder import DELTA_FILE, RATES, RATES_FILE, TRAINED_FILE
from sift_cli.runs.session import load_rows
from sift_cli.runs.summary import Summary
from sift_cli.system.files import write_text
from sift_cli.tasks.metrics import LOSS
from sift_cli.training.batches import steps_of

TRIED = 5  # rates, each APART from the next
APART = 2.0
MORE = 2  # beyond the edge of these, where the best one lies there
SHARE = 0.1  # of the steps, and of the training rows, which are held out
FEWEST_STEPS, FEWEST_ROWS = 10, 50
WIDTH = 384  # of MiniLM, on which the usual rates were measured
ONE_LOSS = {"keep": "last", "metric": None, "patience": None, "samples": 0}  # of `eval`

Trial = Callable[[Recipe, Path], Summary]  # a whole training into a folder; goes on where it can


def at_best_rate(
    recipe: Recipe, out: Path, trial: Trial, middle: float, console: Console
) -> Recipe:
    """The recipe with the rate that leaves the lowest loss on training rows held out for this.

    Each rate trains by `trial` in its own folder under `out`, at the recipe's schedule drawn
    together into a tenth of the steps; what has finished is not run again. The loss decides and not
    the task's metric: after so few steps a metric is often still that of one class for all rows,
    the same at every rate, and it moves in jumps on the few rows held out, where the loss tells all
    rates apart. The lowest rate is `middle` / 4; the validation rows are never looked at. Writes
    rates.json. Raises SiftError where there are too few rows, or no rate leaves a finite loss (4).
    """
    rows = load_rows(recipe).train
    assert rows is not None
    if len(rows) < FEWEST_ROWS:
        raise SiftError(
            f"train.learning_rate: auto holds out a tenth of the training rows, and {len(rows)} "
            f"are too few for that (at least {FEWEST_ROWS}); give a number"
        )
    steps = steps_of_trial(steps_of(recipe.train, [1] * len(rows)).steps)
    said: list[str] = []

    def loss_at(rate: float) -> float:
        folder = out / RATES / f"{rate:g}"
        try:
            loss = trial(trial_of(recipe, rate, steps), folder).metrics[LOSS] or 0.0
        except SiftError as error:
            if error.code != ExitCode.NOT_FINITE:
                raise
            loss = inf
            said.append(str(error))
        for weights in (DELTA_FILE, TRAINED_FILE):
            (folder / weights).unlink(missing_ok=True)
        shown = f"held-out loss {loss:.4f}" if isfinite(loss) else "diverged"
        console.print(f"learning rate {rate:g}: {shown} after {steps} steps", highlight=False)
        return loss

    tried = search(middle, loss_at)
    best = best_of(tried)
    if not isfinite(tried[best]):
        rates = ", ".join(f"{rate:g}" for rate in sorted(tried))
        raise SiftError(
            f"train.learning_rate: auto: all of {rates} diverged; the last: {said[-1]}",
            ExitCode.NOT_FINITE,
        )
    console.print(f"learning rate {best:g} taken, of {len(tried)}", highlight=False)
    found = {
        "taken": best,
        "steps": steps,
        "tried": [
            {"learning_rate": rate, "loss": loss if isfinite(loss) else None}
            for rate, loss in sorted(tried.items())
        ],
    }
    write_text(out / RATES_FILE, json.dumps(found, indent=2) + "\n")
    return at_rate(recipe, best)


def search(middle: float, loss_at: Callable[[float], float]) -> dict[float, float]:
    """The loss at each rate that is tried: around the middle, then on while the edge is best.

    A loss is infinite where training diverged; where all are, it goes on downwards.
    """
    around = (middle * APART**step for step in range(-(TRIED // 2), TRIED // 2 + 1))
    tried = {rate: loss_at(rate) for rate in map(rounded, around)}
    for _ in range(MORE):
        best = best_of(tried)
        if best == min(tried):
            beyond = rounded(best / APART)
        elif best == max(tried):
            beyond = rounded(best * APART)
        else:
            break
        tried[beyond] = loss_at(beyond)
    return tried


def best_of(tried: Mapping[float, float]) -> float:
    """The rate with the lowest loss, the lower one of two."""
    return min(tried, key=lambda rate: (tried[rate], rate))


def rounded(rate: float) -> float:
    """To three digits: a number that one would write."""
    return float(f"{rate:.3g}")


def trial_of(recipe: Recipe, rate: float, steps: int) -> Recipe:
    """The recipe of one trial: it sees training rows alone, and only its last loss counts."""
    train = {"learning_rate": rate, "max_steps": steps}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"metrics": [LOSS], "inner_holdout": SHARE}),
            "train": recipe.train.model_copy(update=train),
            "eval": recipe.eval.model_copy(update={"every": steps, **ONE_LOSS}),
            "log": recipe.log.model_copy(
                update={"tensorboard": False, "wandb": False, "report": False}
            ),
        }
    )


def at_rate(recipe: Recipe, rate: float) -> Recipe:
    """The recipe with a rate that was found for it."""
    update = {"learning_rate": rate, "learning_rate_from": AUTO}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=update)})


def model_pace(recipe: Recipe) -> float:
    """The rate that the recipe's model bears, beside that of the narrow one of the usual rates.

    Adam's rate falls with the width of a model (Yang et al. 2022, arXiv 2203.03466): each output
    sums over as many more inputs, all of which move by the rate. Of the model, only its
    configuration is read.
    """
    folder = model_folder(recipe.model.path, recipe.model.revision, weights=False)
    width = getattr(read_config(folder).get_text_config(), "hidden_size", None)
    return WIDTH / max(width or WIDTH, WIDTH)


def usual_rate_for(recipe: Recipe, narrow: float | None = None) -> float:
    """The usual rate on the recipe's model, where that on a narrow one is `narrow`.

    If that is not given, it is that of the recipe's density and policy.
    """
    return rounded((narrow or recipe.selection.usual_rate) * model_pace(recipe))


def with_rate(recipe: Recipe, narrow: float | None = None) -> Recipe:
    """The recipe; where it says nothing of the rate, with the usual one."""
    if recipe.train.learning_rate is not None:
        return recipe
    update = {"learning_rate": usual_rate_for(recipe, narrow)}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=update)})


def at_usual_rate(recipe: Recipe) -> Recipe:
    """The recipe; where it names no rate, with the usual one, near which trials would look."""
    if recipe.train.learning_rate == AUTO:
        return at_rate(recipe, usual_rate_for(recipe))
    return with_rate(recipe)


def steps_of_trial(steps: int) -> int:
    """How many steps a trial takes for a run of `steps`."""
    return min(steps, max(FEWEST_STEPS, ceil(SHARE * steps)))


def trial_steps(recipe: Recipe, steps: int) -> int:
    """How many steps all trials take before a run of `steps`, if none lies beyond the edge."""
    return TRIED * steps_of_trial(steps) if recipe.train.learning_rate == AUTO else 0


def remove_trials(out: Path) -> None:
    """Takes away what is left of the search of an earlier run."""
    shutil.rmtree(out / RATES, ignore_errors=True)
    (out / RATES_FILE).unlink(missing_ok=True)
