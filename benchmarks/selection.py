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


def best(rows: list[dict[str, Any]]) -> dict[float, list[float]]:
    """The scores of one policy at its best rate, and then those at the others: rate -> scores."""
    by_rate: dict[float, list[float]] = {}
    for row in rows:
        by_rate.setdefault(row["rate"], []).append(row["score"])
    most = max(map(len, by_rate.values()))  # a rate with fewer seeds is not compared
    order = sorted(by_rate, key=lambda rate: (len(by_rate[rate]) < most, -mean(by_rate[rate])))
    return {rate: by_rate[rate] for rate in order}


def table(rows: list[dict[str, Any]]) -> str:
    """One line per policy, one column per task and density, each at its best rate."""
    groups: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        cell = groups.setdefault((row["task"], row["density"]), {})
        cell.setdefault(row["policy"], []).append(row)
    columns = sorted(groups, key=lambda key: (-key[1], key[0]))
    lines = ["| policy | " + " | ".join(f"{t}, {d:.4g}" for t, d in columns) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    first = {p: mean(next(iter(best(r).values()))) for p, r in groups[columns[0]].items()}
    policies = {policy for cell in groups.values() for policy in cell}
    for policy in sorted(policies, key=lambda policy: -first.get(policy, -1.0)):
        cells = []
        for column in columns:
            found = groups[column].get(policy)
            scores = next(iter(best(found).values())) if found else []
            spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
            seeds = f" ({len(scores)})" if scores else ""
            cells.append(f"{mean(scores):.3f}{spread}{seeds}" if scores else "")
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
