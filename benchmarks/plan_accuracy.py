"""What `sift plan` says a step needs, beside what a step takes.

usage: python benchmarks/plan_accuracy.py [WORKLOAD...] [--density .01] [--checkpointing]

A workload is a shape, `roberta-base:8x128`. Each method takes steps in processes of its own: one
under torch's profiler, which sees every allocation of a tensor, and one as it is, for the resident
size, which also holds what the C library keeps of what was freed. Prints a table as Markdown, and
the planned parts below it; sizes are those of a step with the model's weights.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from methods import METHODS, layers_of, lora_rank
from steps import Worker
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForSequenceClassification
from workloads import Workload

from sift_cli.analysis.memory import Batch, PeakMemory, ordinary, sparse
from sift_cli.analysis.methods import adapt
from sift_cli.models.names import head_of
from sift_cli.models.prepare import recompute_activations
from sift_cli.selection.scores import find_score
from sift_cli.selection.select import Rule
from sift_cli.selection.select import planned as entries_of
from sift_cli.selection.targets import choose_weights

STEPS = 4
STEP = "the step that counts"
DEFAULT_METHODS = ["sift entry", "sift entry, random mask", "sift column", "LoRA, sift's dropout"]
DEFAULT = ["minilm:8x128", "minilm:32x64", "roberta-base:8x128", "smollm2-135m:4x128"]


def main() -> None:
    """Counts, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=DEFAULT)
    parser.add_argument("--methods", nargs="+", default=DEFAULT_METHODS)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return work(json.loads(given.worker))
    print("| workload | method | planned, MB | allocated, MB | ratio | resident, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    told = []
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
            used, resident = weights + allocated(settings), weights + peak(settings)
            print(
                f"| {name} | {method} | {total / 1e6:,.1f} | {used / 1e6:,.1f} "
                f"| {total / used:.3f} | {resident / 1e6:,.0f} |",
                flush=True,
            )
            told.append([name, method, *(f"{size / 1e6:,.1f}" for size in parts.values())])
    print("\n| workload | method | " + " | ".join(parts) + " |")
    print("| --- | --- |" + " --- |" * len(parts))
    for cells in told:
        print("| " + " | ".join(cells) + " |")


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
        names = [name for name in names if name.endswith("weight")]
        structure = method.split(",")[0].split()[1]
        block = 16 if structure == "block" else 1
        rule = Rule(find_score("gradient"), structure=structure, density=density, block=block)
        counts = entries_of(model, names, rule)
        ready = sparse(counts, head, structure, 16)
    elif method.startswith("LoRA"):
        rank = lora_rank(model, head, density)

        def make() -> Any:
            with torch.device("meta"):
                return adapt(build(), "lora", layers_of(model, head), head, rank)

    return PeakMemory(make, batch, checkpointing).step(ready)


def peak(settings: dict[str, Any]) -> int:
    """The largest resident size of a step above that of the loaded model."""
    worker = Worker(settings)
    worker.read()
    found = max(int(worker.ask()["peak"]) for _ in range(STEPS))
    worker.close()
    return found


def allocated(settings: dict[str, Any]) -> int:
    """The most bytes of tensors alive in a step, above the loaded model's."""
    command = [sys.executable, __file__, "--worker", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def work(settings: dict[str, Any]) -> None:
    """Prepares a method, takes two steps, prints the peak of the second."""
    workload = Workload.of(settings["workload"], dtype=settings["dtype"])
    model, batches, head = workload.open(2)
    model.train()
    if settings["checkpointing"]:
        recompute_activations(model)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        ready = METHODS[settings["method"]](model, batches[-1], head, settings["density"])
        for name, batch in zip(("first", STEP), batches, strict=True):
            with record_function(name):
                loss = ready.model(**batch).loss
                loss.backward()
                del loss
                ready.update()
    print(peak_within(found, STEP))


def peak_within(found: profile, name: str) -> int:
    """The most bytes alive while the part called `name` ran, of those allocated under `found`."""
    nodes = list(found.profiler.kineto_results.experimental_event_tree())
    changes, span = [], (0, 0)
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.name == name:
            span = node.start_time_ns, node.end_time_ns
        elif node.tag == _EventType.Allocation:
            changes.append((node.start_time_ns, node.extra_fields.total_allocated))
    return max(total for when, total in changes if span[0] <= when <= span[1])


if __name__ == "__main__":
    main()
