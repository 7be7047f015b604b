"""Every policy on MiniLM: which way to choose entries is best, and why.

usage: python benchmarks/selection.py MODEL DATA --out OUT [--tasks cola] [--densities .01]
       [--rates 1e-3 2e-3 4e-3] [--seeds 42] [--policies sift random]

MODEL is a model folder, DATA a folder with one folder of GLUE files per task. Every run is a
`sift train` of its own, on one core, and is skipped where its summary is there already, so a study
can be cut into many calls. Each call writes OUT/results.json with all runs that OUT holds, and
prints the table of docs/selection.md: the rate with the best mean over seeds, mean and standard
deviation.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from trainings import arguments, run

from sift_cli.selection.policies import POLICIES

# beside the rows of the policy table: what happens to Adam's history, and a head that is warm
VARIANTS = {
    "current-batch-reset": ["selection.policy=current-batch", "selection.history=reset"],
    "current-batch-park": ["selection.policy=current-batch", "selection.history=park"],
    "every-20": ["selection.policy=sift", "selection.schedule=every-n-steps"],
    "sift-warm-head": ["selection.policy=sift", "selection.schedule=after-warmup"],
    "full": ["selection.policy=magnitude", "selection.target=all"],
}
METHODS = {name: [f"selection.policy={name}"] for name in POLICIES} | VARIANTS
NAME = re.compile(
    r"(?P<task>[a-z0-9]+)-(?P<policy>.+)-d(?P<density>.+)-r(?P<rate>.+)-s(?P<seed>\d+)"
)


def main() -> None:
    """Trains, gathers and prints."""
    parser = arguments(__doc__)
    parser.add_argument("--policies", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--densities", nargs="+", type=float, default=[0.01, 0.001])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    given = parser.parse_args()
    with ThreadPoolExecutor(given.jobs) as pool:
        jobs: dict[str, Any] = {}
        for seed, task, density, rate, policy in product(
            given.seeds, given.tasks, given.densities, given.rates, given.policies
        ):
            if policy == "full":
                density = 1.0
            changes = [f"train.learning_rate={rate}", f"train.seed={seed}"]
            changes.append(f"selection.density={density}")
            name = f"{task}-{policy}-d{density:g}-r{rate:g}-s{seed}"
            if name not in jobs:
                out = given.out / name
                jobs[name] = pool.submit(
                    run, given.model, given.data, out, task, [*METHODS[policy], *changes]
                )
        for job in jobs.values():
            job.result()
    rows = gather(given.out)
    (given.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def gather(out: Path) -> list[dict[str, Any]]:
    """What every finished run in `out` scored."""
    rows = []
    for summary in sorted(out.glob("*/summary.json")):
        found = NAME.fullmatch(summary.parent.name)
        if found is None:
            continue
        said = json.loads(summary.read_text())
        (score,) = said["metrics"].values()
        rows.append(
            {
                "task": found["task"],
                "policy": found["policy"],
                "density": float(found["density"]),
                "rate": float(found["rate"]),
                "seed": int(found["seed"]),
                "score": score,
                "trained_entries": said["trained_entries"],
                "changed_entries": said["changed_entries"],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One line per task, density and policy, best first, at the best rate; all rates told."""
    lines = [
        "| task | density | policy | score | seeds | rate | other rates | changed entries |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, float, str], dict[float, list[dict[str, Any]]]] = {}
    for row in rows:
        key = (row["task"], row["density"], row["policy"])
        groups.setdefault(key, {}).setdefault(row["rate"], []).append(row)
    shown = []
    for (task, density, policy), by_rate in groups.items():
        means = {rate: mean(one["score"] for one in some) for rate, some in by_rate.items()}
        most = max(len(some) for some in by_rate.values())  # seeds; fewer are not compared
        best = max((r for r in means if len(by_rate[r]) == most), key=lambda rate: means[rate])
        scores = [one["score"] for one in by_rate[best]]
        spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
        others = ", ".join(
            f"{value:.3f} at {rate:g}" for rate, value in sorted(means.items()) if rate != best
        )
        changed = by_rate[best][0]["changed_entries"]
        line = (
            f"| {task} | {density:g} | {policy} | {means[best]:.3f}{spread} | {len(scores)} "
            f"| {best:g} | {others} | {changed:,} |"
        )
        shown.append((task, -density, -means[best], line))
    return "\n".join([*lines, *(line for *_, line in sorted(shown))])


if __name__ == "__main__":
    main()
