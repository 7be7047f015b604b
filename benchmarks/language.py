"""Which method is best on a language model: the runs and tables of docs/language-models.md.

usage: python benchmarks/language.py STAGE --model FOLDER --data FOLDER --out OUT [--dry-run]
       [--tasks mawps] [--methods sift lora] [--densities .01] [--jobs 2] [--budget-hours 2] ...

Stages, methods and files are those of benchmarks/quality.py. The data FOLDER holds a folder with
train.jsonl and validation.jsonl for each task, and gsm8k/test200.jsonl (or --unseen FILE), which
no run trains on: its loss tells what is forgotten. Rates are chosen by the loss after --tried-steps
steps, runs take --steps; a step is 8 rows. Of the validation split the first --rows are used; the
first --answers of them are answered (benchmarks/language_scores.py) by each run, and by the model
before training. `table` writes OUT/language.md and OUT/rates.png.

`sign-descent` looks at 128 batches before the first step, which is more than a run of 60 steps
sees; `sign-descent+few` looks at 32. `--dry-run` tells how many runs of each method are left in a
stage, and about how many hours of one core they take with SmolLM2-135M. By --steps 40 --rows 100
--answers 50, with 100 rows of gsm8k, the seven methods (`sign-descent+few`) take, in core-hours:

  rates of mawps at .01, which stand for both tasks: 1.4      runs there, 3 seeds: 2.5
  rates of mawps at .001 of `sign-descent+few random lora`: .7      runs there, 2 seeds: .8
  runs of openbookqa at .01 of `sign-descent+few sift lora full`, 2 seeds: 1.0

Screening comes first: rates and one seed of two methods, `sift lora`, at .01: .4 + .2.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from language_tables import write_language_tables
from quality_tables import Run
from study import (
    ALONE,
    ROOT,
    SCORES,
    Design,
    Study,
    cells,
    find,
    options,
    runs_of,
    study_of,
    train_all,
)

from sift_cli.analysis.methods import usual_rate_of
from sift_cli.selection.policies import POLICIES

SHARED: dict[str, Any] = {
    "train.batch_size": 8,
    "data.max_length": 512,
    "train.precision": "float32",
    "eval.keep": "last",
    "eval.every": 1_000_000,  # the last step alone
    "eval.max_tokens": 1024,  # so that the peak of memory is that of training
    "checkpoint.every": 20,
    "log.every": 1,
    "log.report": False,
}
TASKS: dict[str, dict[str, Any]] = {
    "mawps": {"data.task": "instruct"},
    "openbookqa": {"data.task": "instruct"},
}
USUAL = ("sign-descent", "sift", "neuron-gradient", "snip", "random", "lora", "full")
PACE = 0.5  # 2e-3 was best at 1 % of SmolLM2-135M in a pilot, half of what a BERT bears
UNSEEN = "gsm8k/test200.jsonl"

# Seconds of one core with SmolLM2-135M, to tell beforehand what a study takes.
STEP = 4.5  # of 8 rows of MAWPS
ROW = 0.3  # to evaluate one of them
ANSWER = 1.5  # of some 15 tokens; 3.4 where all 48 are used
UNSEEN_ROW = 0.7
START = 15.0  # of a process


def middle(method: str, density: float | None) -> float:
    """The middle of the rates to try: half of sift's own usual one on a narrow model."""
    name = find(method).baseline or method.partition("+")[0]
    return PACE * usual_rate_of(name, density or 0.01, "instruct")


def scored(given: argparse.Namespace, run: Run, recipe: Path, folder: Path) -> list[str]:
    """The process that scores a run of the stage `runs`."""
    return [] if run.stage != "runs" else scoring(given, method_of(run.method), recipe, folder)


def method_of(name: str) -> str:
    """What language_scores.py calls what a run has written."""
    return find(name).baseline or "delta"


def scoring(given: argparse.Namespace, method: str, recipe: Path, folder: Path) -> list[str]:
    """The process that scores what lies in a folder."""
    script = str(ROOT / "benchmarks/language_scores.py")
    asked = ["--unseen", given.unseen, "--answers", str(given.answers)]
    return [sys.executable, script, method, str(recipe), str(folder), *asked]


def design_of(given: argparse.Namespace) -> Design:
    """What the options ask for."""
    return Design(
        shared={**SHARED, "train.max_steps": given.steps},
        tasks=TASKS,
        middle=middle,
        trying={"data.holdout": 0.1, "train.max_steps": given.tried_steps},
        after=partial(scored, given),
    )


def lay_out(given: argparse.Namespace, study: Study) -> Study:
    """The study on the first rows of each validation split, which it writes to OUT/data."""
    data = given.out / "data"
    for task in given.tasks:
        for split, count in (("train", None), ("validation", given.rows)):
            with Path(given.data, task, f"{split}.jsonl").open() as lines:
                kept = "".join(islice(lines, count))
            file = data / task / f"{split}.jsonl"
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(kept)
            elif file.read_text() != kept:
                sys.exit(f"{file}: made of other rows than these; give another --out")
    return replace(study, data=str(data))


def base_scores(given: argparse.Namespace, study: Study) -> None:
    """Scores the model as it is on each task, where that has not been done."""
    for task in given.tasks:
        run = Run("base", task, "full", None, 1.0, given.seeds[0])
        folder = given.out / "base" / task
        if not (folder / SCORES).is_file():
            words = scoring(given, "base", study.recipe(run), folder)
            subprocess.run(words, env={**os.environ, **ALONE}, check=True)


def read_base(out: Path) -> dict[str, dict[str, float]]:
    """Scores of the model as it is, by task."""
    files = (out / "base").glob(f"*/{SCORES}")
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def seconds(given: argparse.Namespace, run: Run) -> float:
    """About how long a run takes on one core."""
    settings = design_of(given).settings(run)
    policy = POLICIES.get(settings.get("selection.policy", ""))
    batches = settings.get("selection.batches", policy.defaults.get("batches", 0) if policy else 0)
    seen = 0 if find(run.method).baseline else int(batches)
    rows = lines_of(Path(given.data, run.task, "validation.jsonl"))
    evaluated = min(rows, given.rows)
    if run.stage == "rates":
        evaluated = lines_of(Path(given.data, run.task, "train.jsonl")) // 10
    trained = START + STEP * (seen + settings["train.max_steps"]) + 2 * ROW * evaluated
    unseen = UNSEEN_ROW * lines_of(Path(given.unseen))
    answered = START + unseen + ANSWER * min(given.answers, evaluated)
    return trained + (answered if run.stage == "runs" else 0)


def lines_of(file: Path) -> int:
    """How many lines a file has."""
    with file.open() as lines:
        return sum(1 for _ in lines)


def forecast(given: argparse.Namespace, study: Study) -> str:
    """The runs that are left in a stage, and about what they take, by method."""
    if given.stage == "rates":
        runs, _ = runs_of(given, study.design, [])
    else:  # at whichever rate
        runs = [Run("runs", *cell, 1.0, seed) for seed in given.seeds for cell in cells(given)]

    def key(one: Run) -> tuple[Any, ...]:
        return (one if one.stage == "rates" else replace(one, rate=1.0)).key

    done = {key(row) for row in study.finished()}
    left = [run for run in runs if key(run) not in done]
    lines = []
    for method in given.methods:
        own = [seconds(given, run) for run in left if run.method == method]
        lines.append(f"{method}: {len(own)} runs, {sum(own) / 3600:.2f} core-hours")
    total = sum(seconds(given, run) for run in left)
    return "\n".join([*lines, f"all: {len(left)} runs, {total / 3600:.2f} core-hours"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Carries out a stage."""
    parser = options(__doc__, TASKS, methods=USUAL, seeds=[42, 43, 44])
    parser.add_argument("--steps", type=int, default=60, help="of a run")
    parser.add_argument("--tried-steps", type=int, default=20, help="of the stage rates")
    parser.add_argument("--rows", type=int, default=200, help="of the validation split")
    parser.add_argument("--answers", type=int, default=100)
    parser.add_argument("--unseen", help=f"rows of no task; {UNSEEN} of the data if not given")
    parser.add_argument("--dry-run", action="store_true", help="tell what a stage would take")
    given = parser.parse_args(arguments)
    given.unseen = given.unseen or str(Path(given.data, UNSEEN).resolve())
    study = study_of(given, design_of(given))
    if given.dry_run:
        print(forecast(given, study))
    elif given.stage == "table":
        base = read_base(given.out)
        print(write_language_tables(study.finished(), base, given.out, given.against))
    else:
        study = lay_out(given, study)
        if given.stage == "runs":
            base_scores(given, study)
        train_all(given, study)


if __name__ == "__main__":
    main()
