"""Forward, backward, optimizer and memory of one training step, methods side by side.

usage: python benchmarks/steps.py WORKLOAD... --out OUT [--model FOLDER --data FOLDER]

WORKLOAD is a shape with random weights, `roberta-base:16x128`, or a GLUE task with the model and
the rows of --model and --data, `rte:16`. Each method runs in a process of its own, and these take
turns: one step each per round, in an order that changes from round to round, so that a disturbance
meets all alike. Times are medians over rounds with the smallest and largest beside; the peak memory
is what a step needs above the loaded model (resident size on a CPU, allocated and reserved on a
GPU). Writes OUT/steps.json and a plot, and prints a table as Markdown.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

PARTS = ("forward", "backward", "optimizer", "step")
WARM_UP = 2  # rounds


def main() -> None:
    """Measures every workload and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("runs/steps"))
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return work(json.loads(given.worker))
    from methods import METHODS
    from plots import plot_steps

    given.out.mkdir(parents=True, exist_ok=True)
    found = []
    for workload in given.workloads:
        settings = {
            "workload": workload,
            "model": given.model,
            "data": given.data,
            "density": given.density,
            "rounds": given.rounds,
            "dtype": given.dtype,
            "autocast": given.autocast,
            "checkpointing": given.checkpointing,
            "device": given.device,
        }
        found.append(compare(settings, given.methods or list(METHODS)))
        print(table(found[-1]), flush=True)
        (given.out / "steps.json").write_text(json.dumps(found, indent=2) + "\n")
        plot_steps(found, given.out / "steps.png")


def compare(settings: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """One workload: a process per method, one step of each per round."""
    workers = {name: Worker({**settings, "method": name}) for name in methods}
    about = {name: worker.read() for name, worker in workers.items()}
    steps = in_turn(workers, settings["rounds"])
    results = {}
    for name in methods:
        times = {part: [1e3 * step[part] for step in steps[name]] for part in PARTS}
        results[name] = {
            **about[name],
            "peak": max(step["peak"] for step in steps[name]),
            "reserved": max(step["reserved"] for step in steps[name]),
            **{
                part: {"median": median(some), "min": min(some), "max": max(some)}
                for part, some in times.items()
            },
        }
    if "LoRA" in results:
        base = results["LoRA"]
        for name, result in results.items():
            ratios = [
                one["step"] / other["step"]
                for one, other in zip(steps[name], steps["LoRA"], strict=True)
            ]
            result["ratio"] = median(ratios)
            result["peak_ratio"] = result["peak"] / base["peak"]
    return {**settings, "machine": machine(), "results": results}


def in_turn(workers: "dict[str, Worker]", rounds: int) -> dict[str, list[dict[str, float]]]:
    """What each worker measured of so many steps, after two to warm up; then they are closed."""
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for round in range(rounds + WARM_UP):
        for name in workers if round % 2 else reversed(workers):
            measured = workers[name].ask()
            if round >= WARM_UP:
                steps[name].append(measured)
    for worker in workers.values():
        worker.close()
    return steps


class Worker:
    """A process that holds one method and takes a step when it is asked to."""

    def __init__(self, settings: dict[str, Any], script: str = __file__) -> None:
        self.process = subprocess.Popen(
            [sys.executable, script, "--worker", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self) -> dict[str, float]:
        """Takes one step."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        """What the process says next."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a worker ended with exit code {self.process.wait()}")
        said: dict[str, Any] = json.loads(line)
        return said

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def answering() -> Callable[[dict[str, Any]], None]:
    """What a worker answers by, a line each, on its standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(what: dict[str, Any]) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    return answer


def work(settings: dict[str, Any]) -> None:
    """A worker: one model, one method, a step for each line that comes in."""
    answer = answering()
    import torch
    from methods import METHODS, ON_REQUEST
    from workloads import Workload

    from sift_cli.models.devices import autocast, pick_device
    from sift_cli.models.prepare import recompute_activations

    device = pick_device(settings["device"])
    workload = Workload.of(
        settings["workload"],
        model=settings["model"],
        data=settings["data"],
        dtype=settings["dtype"],
        device=str(device),
    )
    model, batches, head = workload.open(settings["rounds"] + 3)
    memory = Memory(device)
    model.train()
    if settings["checkpointing"]:
        recompute_activations(model)
    torch.manual_seed(0)
    ready = (METHODS | ON_REQUEST)[settings["method"]](
        model, batches[-1], head, settings["density"]
    )
    answer({"entries": ready.entries})
    for batch in batches:
        if not sys.stdin.readline():
            return
        memory.restart()
        clock = [now(device)]
        with autocast(device, settings["autocast"]):
            loss = ready.model(**batch).loss
        clock.append(now(device))
        loss.backward()
        clock.append(now(device))
        ready.update()
        clock.append(now(device))
        del loss
        parts = [after - before for before, after in itertools.pairwise(clock)]
        answer(dict(zip(PARTS, [*parts, sum(parts)], strict=True)) | memory.read())


class Memory:
    """The largest need for memory since `restart`, above what is there when this is made."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.base = self._status("VmRSS") if device.type == "cpu" else self._allocated()

    def _allocated(self) -> int:
        import torch

        return torch.cuda.memory_allocated(self.device)

    def restart(self) -> None:
        """Forgets earlier peaks."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> dict[str, int]:
        """Bytes above the model: `peak` in use and `reserved` by the allocator."""
        import torch

        if self.device.type == "cuda":
            return {
                "peak": torch.cuda.max_memory_allocated(self.device) - self.base,
                "reserved": torch.cuda.max_memory_reserved(self.device) - self.base,
            }
        peak = self._status("VmHWM") - self.base
        return {"peak": peak, "reserved": peak}

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def now(device: Any) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((one.partition(": ")[2] for one in lines if "model name" in one), name)
    return {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def table(found: dict[str, Any]) -> str:
    """One line per method."""
    lines = [
        f"\n{found['workload']}, {found['density']:.0%}, {found['dtype']}"
        + (", bfloat16 autocast" if found["autocast"] else "")
        + (", checkpointing" if found["checkpointing"] else ""),
        "",
        "| method | entries | forward, ms | backward, ms | optimizer, ms | step, ms (min, max) "
        "| to LoRA | peak, MB | to LoRA |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in found["results"].items():
        step = one["step"]
        lines.append(
            f"| {name} | {one['entries']:,} "
            + "".join(f"| {one[part]['median']:.1f} " for part in PARTS[:3])
            + f"| {step['median']:.1f} ({step['min']:.1f}, {step['max']:.1f}) "
            f"| {one.get('ratio', float('nan')):.2f} | {one['peak'] / 1e6:,.0f} "
            f"| {one.get('peak_ratio', float('nan')):.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
