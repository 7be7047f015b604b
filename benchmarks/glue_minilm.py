"""MiniLM on RTE, CoLA and SST-2: sift and random at 1 %, and full fine-tuning, side by side.

usage: python benchmarks/glue_minilm.py MODEL DATA --out OUT [--tasks rte cola sst2] [--seeds 42]

MODEL is a model folder, DATA a folder with one folder of GLUE files per task. Every run is a
`sift train` of its own, on one core, and is skipped where its summary is there already. First each
method's learning rate is tuned on 3,000 of SST-2's *training* rows, with others held out for it;
the validation splits see only the tuned rates, and the weights of the last step. Writes
OUT/results.json and prints the tables as Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

METHODS: dict[str, list[str]] = {
    "sift": ["selection.policy=sift", "selection.density=0.01"],
    "random": ["selection.policy=random", "selection.density=0.01"],
    "full": ["selection.policy=magnitude", "selection.density=1.0", "selection.target=all"],
}
RATES = {
    "sift": [1e-3, 2e-3, 4e-3],
    "random": [1e-3, 2e-3, 4e-3],
    "full": [1e-4, 2e-4, 4e-4],
}
TASKS = {
    "rte": ["train.epochs=6"],
    "cola": ["train.epochs=5"],
    "sst2": ["train.epochs=3", "data.max_train_rows=10000"],
}
TUNING = ["data.holdout=0.02", "data.max_train_rows=3000", "train.epochs=2"]
SHARED = ["eval.keep=last", "train.batch_size=32", "data.max_length=128"]


def run(model: str, data: str, out: Path, task: str, changes: list[str]) -> dict[str, Any]:
    """The summary of one `sift train`, from disk where it is there already."""
    summary = out / "summary.json"
    if not summary.is_file():
        out.mkdir(parents=True, exist_ok=True)
        recipe = out.parent / f"{out.name}.yaml"
        recipe.write_text(
            f"model: {{path: {model}}}\ndata: {{path: {data}/{task}, task: {task}}}\n"
        )
        command = [sys.executable, "-m", "sift_cli", "train", str(recipe), "--out", str(out)]
        for change in [*SHARED, *changes]:
            command += ["--set", change]
        print("running", out.name, flush=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{out}: exit {done.returncode}\n{done.stderr}")
    found: dict[str, Any] = json.loads(summary.read_text())
    return found


def main() -> None:
    """Tunes, trains, and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    with ThreadPoolExecutor(given.jobs) as pool:

        def start(name: str, task: str, changes: list[str]) -> Any:
            return pool.submit(run, given.model, given.data, given.out / name, task, changes)

        tuning = {
            (method, rate): start(
                f"tune-{method}-{rate:g}",
                "sst2",
                [*METHODS[method], *TUNING, f"train.learning_rate={rate}"],
            )
            for method, rates in RATES.items()
            for rate in rates
        }
        tuned = {key: future.result()["metrics"]["accuracy"] for key, future in tuning.items()}
        best = {method: max(RATES[method], key=lambda r: tuned[method, r]) for method in METHODS}
        runs = {
            (task, method, seed): start(
                f"{task}-{method}-{seed}",
                task,
                [
                    *METHODS[method],
                    *TASKS[task],
                    f"train.learning_rate={best[method]}",
                    f"train.seed={seed}",
                ],
            )
            for task in given.tasks
            for seed in given.seeds
            for method in METHODS
        }
        summaries = {key: future.result() for key, future in runs.items()}
    report = {
        "tuning": [{"method": m, "rate": r, "accuracy": v} for (m, r), v in tuned.items()],
        "rates": best,
        "runs": [{"method": key[1], **summary} for key, summary in summaries.items()],
    }
    (given.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print(tables(report))


def tables(report: dict[str, Any]) -> str:
    """The tuning and the results as Markdown."""
    lines = ["| method | learning rate | SST-2, held out |", "| --- | --- | --- |"]
    for row in report["tuning"]:
        mark = " (chosen)" if report["rates"][row["method"]] == row["rate"] else ""
        lines.append(f"| {row['method']} | {row['rate']:g}{mark} | {row['accuracy']:.3f} |")
    lines += [
        "",
        "| task | method | metric | seeds | entries | peak memory, MB | delta, kB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in report["runs"]:
        groups.setdefault((one["task"], one["method"]), []).append(one)
    for (task, method), some in groups.items():
        (name,) = some[0]["metrics"]
        scores = [one["metrics"][name] for one in some]
        first = some[0]
        lines.append(
            f"| {task} | {method} | {name} {mean(scores):.3f} | {len(scores)} "
            f"| {first['trained_entries']:,} "
            f"| {first['peak_memory_bytes'] / 1e6:,.0f} | {first['delta_bytes'] / 1e3:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
