"""`train.learning_rate: auto`: a few rates tried on training rows, and the best one taken."""

import json
import shutil
from collections.abc import Callable, Mapping
from math import ceil, inf, isfinite
from pathlib import Path

from rich.console import Console

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.loading import DTYPES, model_folder, on_meta, read_config
from sift_cli.models.names import head_of
from sift_cli.recipe import AUTO, Recipe, usual_rate
from sift_cli.runs.folder import DELTA_FILE, RATES, RATES_FILE, TRAINED_FILE
from sift_cli.runs.ranks import ALONE, Ranks
from sift_cli.runs.session import load_rows
from sift_cli.runs.summary import Summary
from sift_cli.selection.policies import POLICIES
from sift_cli.selection.select import check, planned
from sift_cli.selection.targets import choose_weights
from sift_cli.system.files import write_text
from sift_cli.tasks.kinds import expected_task
from sift_cli.tasks.metrics import LOSS
from sift_cli.training.batches import steps_of
from sift_cli.training.parts import rule_of

TRIED = 5  # rates, each APART from the next
APART = 2.0
MORE = 2  # beyond the edge of these, where the best one lies there
SHARE = 0.1  # of the steps, and of the training rows, which are held out
FEWEST_STEPS, FEWEST_ROWS = 10, 50
FEW_HELD_OUT = 200  # rows; the loss on fewer cannot tell neighbouring rates apart
WIDTH = 384  # of MiniLM, on which the usual rates were measured
# of `eval`
ONE_LOSS = {"before": False, "keep": "last", "metric": None, "patience": None, "samples": 0}

Trial = Callable[[Recipe, Path], Summary]  # a whole training into a folder; goes on where it can


def at_best_rate(
    recipe: Recipe,
    out: Path,
    trial: Trial,
    middle: float,
    console: Console,
    ranks: Ranks = ALONE,
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
    require_enough_rows(len(rows))
    held_out = ceil(SHARE * len(rows))
    if held_out < FEW_HELD_OUT:
        console.print(
            f"train.learning_rate: auto has {held_out} rows to compare rates on; with fewer than "
            f"{FEW_HELD_OUT} chance has a say in which is best, so give a number, or leave the "
            "key out for the usual rate",
            highlight=False,
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
    ranks.on_main(lambda: _note(out / RATES_FILE, best, steps, tried))
    return at_rate(recipe, best)


def _note(file: Path, best: float, steps: int, tried: Mapping[float, float]) -> None:
    """Writes what was tried, with the loss of each; null where it was not finite."""
    losses = [
        {"learning_rate": rate, "loss": loss if isfinite(loss) else None}
        for rate, loss in sorted(tried.items())
    ]
    found = {"taken": best, "steps": steps, "tried": losses}
    write_text(file, json.dumps(found, indent=2) + "\n")


def rated(
    recipe: Recipe, out: Path, trial: Trial, narrow: float | None, console: Console, ranks: Ranks
) -> Recipe:
    """The recipe with its rate: its own, the best of a few tried by `trial`, or the usual one.

    `narrow` is as `usual_rate_for` has it.
    """
    if recipe.train.learning_rate == AUTO:
        middle = usual_rate_for(recipe, narrow)
        recipe = at_best_rate(recipe, out, trial, middle, console, ranks)
    return with_rate(recipe, narrow)


def require_enough_rows(rows: int) -> None:
    """Raises SiftError where so many rows to train on are too few to try rates with."""
    if rows < FEWEST_ROWS:
        raise SiftError(
            f"train.learning_rate: auto holds out a tenth of the training rows, and {rows} "
            f"are too few for that (at least {FEWEST_ROWS}); give a number"
        )


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
    metrics = [LOSS, *(recipe.data.metrics or ())]  # the recipe's tell classes from numbers
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"metrics": metrics, "inner_holdout": SHARE}),
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


def width_of(recipe: Recipe) -> int:
    """The hidden size of the recipe's model, of which only its configuration is read; WIDTH where
    that names none."""
    return width_in(read_config(_folder(recipe)))


def width_in(config: object) -> int:
    """The hidden size that a configuration names; WIDTH where it names none."""
    text = getattr(config, "get_text_config", lambda: config)()
    width: int | None = getattr(text, "hidden_size", None)
    return width or WIDTH


def at_width(narrow: float, width: int) -> float:
    """The rate of a model so wide, where that of a narrow one is `narrow`.

    Adam's rate falls with the width (Yang et al. 2022, arXiv 2203.03466): each output sums over as
    many more inputs, all of which move by the rate.
    """
    return rounded(narrow * WIDTH / max(width, WIDTH))


def share_of(recipe: Recipe) -> float:
    """The share of the targeted entries that train.

    For a budget, or densities by pattern, they are counted in a model on the meta device. Raises
    SiftError where these do not fit it.
    """
    chosen = recipe.selection
    if isinstance(chosen.density, float):
        return chosen.density
    task, folder = expected_task(*recipe.data.expected), _folder(recipe)
    model = on_meta(folder, task.auto, task.configure(folder), DTYPES[recipe.model.dtype])
    new = head_of(model) if task.new_head else []
    names, _ = choose_weights(model, chosen.target, chosen.exclude, chosen.dense, new)
    rule = rule_of(chosen.model_copy(update={"score": "gradient"}))  # no code of a file runs here
    check(model, names, rule)
    sizes: dict[str, int] = {name: one.numel() for name, one in model.named_parameters()}
    return sum(planned(model, names, rule).values()) / sum(sizes[name] for name in names)


def usual_rate_for(recipe: Recipe, narrow: float | None = None) -> float:
    """The usual rate on the recipe's model, where that on a narrow one is `narrow`.

    If that is not given, it is that of the recipe's policy at the share of entries that train.
    """
    narrow = narrow or usual_rate(share_of(recipe), POLICIES[recipe.selection.policy].pace)
    return at_width(narrow, width_of(recipe))


def with_rate(recipe: Recipe, narrow: float | None = None) -> Recipe:
    """The recipe; where it says nothing of the rate, with the usual one."""
    if recipe.train.learning_rate is not None:
        return recipe
    update = {"learning_rate": usual_rate_for(recipe, narrow)}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=update)})


def told_rate(recipe: Recipe, of_policy: bool = True) -> str:
    """What to tell of the usual rate that the recipe has: that of its policy, or of a method."""
    share = f"{100 * share_of(recipe):.3g} % of the entries"
    of = f"{recipe.selection.policy} at {share} of" if of_policy else "this method on"
    wide = f"a model {width_of(recipe)} wide"
    return f"learning rate {recipe.train.rate:g}: the usual one of {of} {wide}"


def rate_from(recipe: Recipe) -> str:
    """Where a run of the recipe has its learning rate from: recipe, usual, or auto."""
    given = recipe.train
    if AUTO in (given.learning_rate, given.learning_rate_from):
        return AUTO
    return "usual" if given.learning_rate is None else "recipe"


def _folder(recipe: Recipe) -> Path:
    return model_folder(recipe.model.path, recipe.model.revision, weights=False)


def at_usual_rate(recipe: Recipe) -> Recipe:
    """The recipe; where it names no rate, with the usual one, near which trials would look."""
    if recipe.train.learning_rate == AUTO:
        return at_rate(recipe, usual_rate_for(recipe))
    return with_rate(recipe)


def steps_of_trial(steps: int) -> int:
    """How many steps a trial takes for a run of `steps`."""
    return min(steps, max(FEWEST_STEPS, ceil(SHARE * steps)))


def trials_of(recipe: Recipe) -> int:
    """How many trainings come before the run to find its rate, if none lies beyond the edge."""
    return TRIED if recipe.train.learning_rate == AUTO else 0


def remove_trials(out: Path) -> None:
    """Takes away what is left of the search of an earlier run."""
    shutil.rmtree(out / RATES, ignore_errors=True)
    (out / RATES_FILE).unlink(missing_ok=True)
