"""MiniLM on SST-2, CoLA and RTE: sift and random, and full fine-tuning, side by side.

usage: python benchmarks/glue_minilm.py MODEL DATA --out OUT [--tasks sst2 cola rte] [--seeds 42]

MODEL is a model folder, DATA a folder with one folder of GLUE files per task. Every run is a
`sift train` of its own, on one core, and is skipped where its summary is there already. A method
with several learning rates is shown with the best, chosen on the validation split itself, so such
scores are a little optimistic; the others are told beside it. Weights are those of the last step.
Writes OUT/results.json and prints a table as Markdown.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from statistics import mean
from typing import Any

from trainings import arguments, run

METHODS: dict[str, list[str]] = {
    "sift 1 %": ["selection.policy=sift", "selection.density=0.01"],
    "random 1 %": ["selection.policy=random", "selection.density=0.01"],
    "full": ["selection.policy=magnitude", "selection.density=1.0", "selection.target=all"],
    "sift .1 %": ["selection.policy=sift", "selection.density=0.001"],
    "random .1 %": ["selection.policy=random", "selection.density=0.001"],
}
RATES: dict[str, dict[str, list[float]]] = {
    "sst2": {
        "sift 1 %": [5e-4, 2e-3, 4e-3],
        "random 1 %": [1e-3, 4e-3],
        "full": [1e-4, 2e-4],
        "sift .1 %": [2e-3, 4e-3],
        "random .1 %": [4e-3, 8e-3],
    },
    "cola": {"sift 1 %": [1e-3, 2e-3, 4e-3], "random 1 %": [1e-3, 2e-3, 4e-3], "full": [1e-4]},
    "rte": {"sift 1 %": [5e-4, 4e-3], "random 1 %": [4e-3], "full": [1e-4]},
}
Key = tuple[str, str, float]


def main() -> None:
    """Trains and prints."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    given = parser.parse_args()
    with ThreadPoolExecutor(given.jobs) as pool:
        waiting: dict[Key, list[Any]] = {}
        for task in given.tasks:
            for method, rates in RATES[task].items():
                for rate in rates:
                    for seed in given.seeds:
                        last = [f"train.learning_rate={rate}", f"train.seed={seed}"]
                        name = f"{task}-{method.replace(' ', '').replace('%', '')}-{rate:g}-{seed}"
                        job = pool.submit(
                            run,
                            given.model,
                            given.data,
                            given.out / name,
                            task,
                            [*METHODS[method], *last],
                        )
                        waiting.setdefault((task, method, rate), []).append(job)
        done = {key: [job.result() for job in jobs] for key, jobs in waiting.items()}
    rows = [
        {"task": task, "method": method, "learning_rate": rate, "runs": runs}
        for (task, method, rate), runs in done.items()
    ]
    (given.out / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))


def score(row: dict[str, Any]) -> float:
    """Mean of the task's metric over seeds."""
    (name,) = row["runs"][0]["metrics"]
    return mean(run["metrics"][name] for run in row["runs"])


def table(rows: list[dict[str, Any]]) -> str:
    """One line per task and method, at its best rate, with the other rates told."""
    lines = [
        "| task | method | metric | at rate | at other rates | entries | peak memory, MB "
        "| delta, kB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"]), []).append(row)
    for (task, method), some in groups.items():
        best, *others = sorted(some, key=score, reverse=True)
        first = best["runs"][0]
        (name,) = first["metrics"]
        told = ", ".join(f"{score(one):.3f} at {one['learning_rate']:g}" for one in others)
        lines.append(
            f"| {task} | {method} | {name} {score(best):.3f} | {best['learning_rate']:g} | {told} "
            f"| {first['trained_entries']:,} | {first['peak_memory_bytes'] / 1e6:,.0f} "
            f"| {first['delta_bytes'] / 1e3:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
