"""Every policy on MiniLM: which way to choose entries is best, and why.

usage: python benchmarks/selection.py MODEL DATA --out OUT [--tasks cola] [--densities .01]
       [--rates 1e-3 2e-3 4e-3] [--seeds 42] [--policies sift random] [--probe]

MODEL is a model folder, DATA a folder with one folder of GLUE files per task. Every run is a
`sift train` of its own, on one core, and is skipped where its summary is there already, so a study
can be cut into many calls. With `--probe`, `sift probe` looks at the policies' masks, at the first
rate and seed given. Each call writes OUT/results.json with all runs that OUT holds, and prints the
tables of docs/selection.md, one for each density: the rate with the best mean over seeds, mean and
standard deviation (and how many seeds, where some policy has more), and the share of the gradient's
norm that the mask keeps; below, their rank correlation over the policies with a fixed mask.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy.stats import spearmanr
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


class Setting(NamedTuple):
    """What runs of one column share."""

    task: str
    density: float
    rate: float
    seed: int

    def name(self, policy: str) -> str:
        """The folder of a run, as NAME reads it."""
        return f"{self.task}-{policy}-d{self.density:g}-r{self.rate:g}-s{self.seed}"

    @property
    def changes(self) -> list[str]:
        """Values of the recipe."""
        return [
            f"train.learning_rate={self.rate}",
            f"train.seed={self.seed}",
            f"selection.density={self.density}",
        ]


def main() -> None:
    """Trains, gathers and prints."""
    parser = arguments(__doc__)
    parser.add_argument("--policies", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--densities", nargs="+", type=float, default=[0.01, 0.001])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--probe", action="store_true")
    given = parser.parse_args()
    with ThreadPoolExecutor(given.jobs) as pool:
        jobs: dict[str, Any] = {}
        for seed, task, density, rate, policy in product(
            given.seeds, given.tasks, given.densities, given.rates, given.policies
        ):
            at = Setting(task, 1.0 if policy == "full" else density, rate, seed)
            name = at.name(policy)
            if name not in jobs:
                changes = [*METHODS[policy], *at.changes]
                jobs[name] = pool.submit(
                    run, given.model, given.data, given.out / name, task, changes
                )
        for task, density in product(given.tasks, given.densities if given.probe else ()):
            at = Setting(task, density, given.rates[0], given.seeds[0])
            masks = ",".join(one for one in given.policies if one in POLICIES and one != "lottery")
            command, out = ["probe", "--policies", masks], given.out / at.name("probe")
            job = (given.model, given.data, out, task, at.changes, command, "probe.json")
            jobs[out.name] = pool.submit(run, *job)
        for job in jobs.values():
            job.result()
    rows, kept = gather(given.out), masks_kept(given.out)
    (given.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    for density in sorted({row["density"] for row in rows}, reverse=True):
        print(table([row for row in rows if row["density"] == density], kept), end="\n\n")


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


def masks_kept(out: Path) -> dict[tuple[str, float], dict[str, float]]:
    """Mean share of later gradients' norm that each policy's mask keeps, by task and density."""
    found = {}
    for file in sorted(out.glob("*/probe.json")):
        name = NAME.fullmatch(file.parent.name)
        if name is not None:
            shares = json.loads(file.read_text())["kept_norm_share"]
            kept = {policy: one["mean"] for policy, one in shares.items()}
            found[name["task"], float(name["density"])] = kept
    return found


def table(rows: list[dict[str, Any]], kept: dict[tuple[str, float], dict[str, float]]) -> str:
    """One line per policy; for each task its score at its best rate and what its mask keeps."""
    groups: dict[str, dict[str, list[float]]] = {}
    tasks = sorted({row["task"] for row in rows})
    for task in tasks:
        of_task = [row for row in rows if row["task"] == task]
        for policy in dict.fromkeys(row["policy"] for row in of_task):
            own = [row for row in of_task if row["policy"] == policy]
            groups.setdefault(policy, {})[task] = next(iter(best(own).values()))
    density = rows[0]["density"]
    most = max(len(scores) for cell in groups.values() for scores in cell.values())
    heads = " | ".join(f"{task} | kept" for task in tasks)
    lines = [f"| policy, {density:.4g} | {heads} |", "| --- |" + " --- |" * 2 * len(tasks)]
    order = sorted(
        groups, key=lambda one: (-len(groups[one]), -mean(map(mean, groups[one].values())))
    )
    for policy in order:
        cells = []
        for task in tasks:
            scores = groups[policy].get(task, [])
            spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
            seeds = f" ({len(scores)})" if len(scores) < most else ""
            cells.append(f"{mean(scores):.3f}{spread}{seeds}" if scores else "")
            share = kept.get((task, density), {}).get(policy)
            cells.append("" if share is None else f"{share:.2f}")
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    found = [rank_correlation(groups, kept.get((task, density), {}), task) for task in tasks]
    return "\n".join([*lines, f"| rank correlation | {' | | '.join(found)} | |"])


def rank_correlation(
    groups: dict[str, dict[str, list[float]]], shares: dict[str, float], task: str
) -> str:
    """Spearman's, of score and share kept, over the policies that choose once and were probed."""
    fixed = [
        policy
        for policy, cell in groups.items()
        if task in cell and policy in shares and POLICIES[policy].schedule == "first-batch"
    ]
    if len(fixed) < 3:
        return ""
    scores = [mean(groups[policy][task]) for policy in fixed]
    found = spearmanr([shares[policy] for policy in fixed], scores)
    return f"{found.statistic:.2f} (p {found.pvalue:.3f}, {len(fixed)} masks)"


if __name__ == "__main__":
    main()
