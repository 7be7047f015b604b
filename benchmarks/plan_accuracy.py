"""What `sift plan` says a step needs, beside what a step takes.

usage: python benchmarks/plan_accuracy.py [WORKLOAD...] [--density .01] [--checkpointing]

A workload is a shape, `roberta-base:8x128`. Each method takes four steps in a process of its own,
twice: with the C library's allocator as it is, which keeps much of what is freed, and with one that
gives everything back at once (MALLOC_MMAP_THRESHOLD_), so that the resident size is what is in use.
Prints a table as Markdown; sizes are those of a step with the model's weights.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from methods import METHODS, _where, lora_rank
from steps import Worker
from transformers import AutoModelForSequenceClassification
from workloads import Workload

from sift_cli.analysis.memory import Batch, Plan, ordinary, sparse
from sift_cli.analysis.plan import head_of
from sift_cli.selection.budget import share
from sift_cli.selection.targets import choose_weights

TIGHT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "1000000"}
STEPS = 4
DEFAULT = ["minilm:8x128", "minilm:32x64", "roberta-base:8x128", "smollm2-135m:4x128"]


def main() -> None:
    """Counts, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=DEFAULT)
    parser.add_argument("--methods", nargs="+", default=["sift entry", "LoRA, sift's dropout"])
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    given = parser.parse_args()
    print("| workload | method | planned, MB | in use, MB | planned / in use | resident, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in given.workloads:
        workload = Workload.of(name, dtype=given.dtype)
        for method in given.methods:
            parts = planned(workload, method, given.density, given.checkpointing)
            weights, total = parts["weights"], sum(parts.values())
            settings = {
                "workload": name,
                "model": None,
                "data": None,
                "density": given.density,
                "rounds": STEPS,
                "dtype": given.dtype,
                "autocast": False,
                "checkpointing": given.checkpointing,
                "device": "cpu",
                "method": method,
            }
            used, resident = (weights + peak(settings, env) for env in (TIGHT, {}))
            print(
                f"| {name} | {method} | {total / 1e6:,.0f} | {used / 1e6:,.0f} "
                f"| {total / used:.2f} | {resident / 1e6:,.0f} |",
                flush=True,
            )


def planned(workload: Workload, method: str, density: float, checkpointing: bool) -> dict[str, int]:
    """The parts of a step, as `sift plan` counts them."""
    assert workload.sequence is not None
    assert method in METHODS
    config = workload._config()

    def build() -> Any:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(
                config, dtype=getattr(torch, workload.dtype)
            )

    model = build()
    head = [name for name in head_of(model) if name.startswith(("classifier", "score"))]
    batch = Batch(workload.batch, workload.sequence, padded=False)
    make: Callable[[], Any] = build
    ready = ordinary
    if method.startswith("sift"):
        names, _ = choose_weights(model, "all-linear", [], [], head)
        counts = {
            name: share(density, model.get_parameter(name).numel())
            for name in names
            if name.endswith("weight")
        }
        structure = method.split()[1]
        ready = sparse(counts, head, structure, 16)
    elif method.startswith("LoRA"):
        from peft import LoraConfig, get_peft_model

        rank = lora_rank(model, head, density)

        def make() -> Any:
            with torch.device("meta"):
                return get_peft_model(
                    build(), LoraConfig(r=rank, lora_alpha=2 * rank, **_where(model, head))
                )

    return Plan(make, batch, checkpointing).step(ready)


def peak(settings: dict[str, Any], env: dict[str, str]) -> int:
    """The largest resident size of a step above that of the loaded model."""
    before = {key: os.environ.get(key) for key in env}
    os.environ.update(env)
    try:
        worker = Worker(settings)
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
    worker.read()
    found = max(int(worker.ask()["peak"]) for _ in range(STEPS))
    worker.close()
    return found


if __name__ == "__main__":
    main()
