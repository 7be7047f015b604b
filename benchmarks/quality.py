"""Which method is best, each at a rate of its own: the runs and tables of docs/quality.md.

usage: python benchmarks/quality.py STAGE --model FOLDER --data FOLDER --out OUT [--jobs 2]
       [--tasks cola sst2] [--methods sift lora] [--densities .01] [--seeds 42 43 44 45 46]
       [--tries 3] [--set train.epochs=1] [--against sift] [--budget-hours 2]

The stages, in their order:

rates  Every method trains at as many rates (--tries), a factor of 2 apart, on nine tenths of the
       training rows of each task and is scored on the rest, with the first seed; the validation
       split is not looked at.
runs   At its rate with the best mean score there, one for all tasks, every method trains on all
       rows with every seed, and is scored on the validation split, with the weights of the last
       step. Also on tasks that the stage before left out.
table  Writes OUT/quality.md and OUT/rates.png, from OUT/results.jsonl alone; prints the former.

A method is a policy or a baseline (lora, lora-r1, shira, full, head-only), with what is added to
it: `scaled-sift`, `random+step`, `sift+step+probe+vectors`, `lora+probe`; an unknown one lists all.

The data FOLDER holds a folder of GLUE files for each task; tasks that it lacks are left out if none
are named. OUT is for one model. Each run is a process of its own, with one thread, and keeps its
folder, OUT/STAGE/TASK-METHOD-DENSITY-RATE-SEED; a line of OUT/results.jsonl tells of each that has
finished. The same command again takes these as they are and goes on with those that were
interrupted; after `--budget-hours` none is begun.
"""

from collections.abc import Sequence
from math import log10
from typing import Any

from quality_tables import write_tables
from study import Design, find, options, study_of, train_all

SHARED = {
    "train.batch_size": 32,
    "data.max_length": 128,
    "train.precision": "float32",  # not every CPU has bfloat16
    "eval.keep": "last",
    "eval.every": 1_000_000,  # the last step alone
    "checkpoint.every": 200,
    "log.every": 1,
    "log.report": False,
}
TASKS: dict[str, dict[str, Any]] = {
    "cola": {"train.epochs": 3},
    "sst2": {"train.epochs": 2, "data.max_train_rows": 10_000},
    "rte": {"train.epochs": 3},
    "mrpc": {"train.epochs": 3},
    "qnli": {"train.epochs": 2, "data.max_train_rows": 6_000},
    "qqp": {"train.epochs": 2, "data.max_train_rows": 6_000},
    "mnli": {"train.epochs": 2, "data.max_train_rows": 6_000},
}
USUAL = ("sign-descent", "random", "sift", "lora", "shira", "full")  # of --methods


def middle(method: str, density: float | None) -> float:
    """The middle of the rates to try: twice as large at a tenth of the entries."""
    rate = find(method).rate
    return rate if density is None else rate * 2 ** log10(0.01 / density)


DESIGN = Design(SHARED, TASKS, middle)


def main(arguments: Sequence[str] | None = None) -> None:
    """Carries out a stage."""
    parser = options(__doc__, TASKS, methods=USUAL, seeds=[42, 43, 44, 45, 46])
    given = parser.parse_args(arguments)
    study = study_of(given, DESIGN)
    if given.stage == "table":
        print(write_tables(study.finished(), given.out, given.against))
    else:
        train_all(given, study)


if __name__ == "__main__":
    main()
