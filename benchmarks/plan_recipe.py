"""What `sift plan` says of the largest step of a recipe, beside what that step takes.

usage: python benchmarks/plan_recipe.py RECIPE [--set key=value ...]

The step is the real one, on real rows with the entries that the recipe chooses, under torch's
profiler, which sees every allocation of a tensor. Prints a line of a table as Markdown; sizes are
those of a step with the model's weights, and without them.
"""

import argparse
from pathlib import Path

from plan_accuracy import STEP, peak_within
from torch.profiler import ProfilerActivity, profile, record_function

from sift_cli.analysis.plan import computed, plan
from sift_cli.models.prepare import prepare_model
from sift_cli.recipe import Recipe, load_recipe
from sift_cli.runs.session import open_session
from sift_cli.training.batches import steps_of
from sift_cli.training.choosing import selecting
from sift_cli.training.rates import at_usual_rate
from sift_cli.training.step import take_step
from sift_cli.training.watch import Watch


def main() -> None:
    """Counts, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", nargs="+", default=[], dest="changes")
    given = parser.parse_args()
    recipe = load_recipe(given.recipe, given.changes)
    parts = plan(recipe)["memory_bytes"]
    counted, weights = parts["peak"], parts["weights"]
    taken = weights + allocated(recipe)
    print("| changes | planned, MB | allocated, MB | ratio | ratio without weights |")
    print("| --- | --- | --- | --- | --- |")
    print(
        f"| {', '.join(given.changes)} | {counted / 1e6:,.0f} | {taken / 1e6:,.0f} "
        f"| {counted / taken:.3f} | {(counted - weights) / (taken - weights):.3f} |"
    )


def allocated(recipe: Recipe) -> int:
    """The most bytes of tensors alive in the largest step, above the loaded model's."""
    session = open_session(recipe)
    assert session.train is not None
    lengths, packs = session.train.lengths, session.task.packs
    batches = steps_of(recipe.train, lengths, packs)
    prepare_model(session.model, session.device, recipe.train.gradient_checkpointing)

    def widest(rows: list[list[int]]) -> int:
        return max(computed([part], lengths, packs) for part in rows)

    rows = max(list(batches)[: batches.steps_per_epoch], key=widest)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        optimizer = selecting(at_usual_rate(recipe))(session, batches).begin()
        watch = Watch(session, optimizer.parameters)
        for step, name in enumerate(("first", STEP), start=1):  # moments come with the first
            with record_function(name):
                take_step(
                    session,
                    optimizer,
                    step,
                    rows,
                    watch.broken,
                    max_grad_norm=recipe.train.max_grad_norm,
                )
    return peak_within(found, STEP)


if __name__ == "__main__":
    main()
