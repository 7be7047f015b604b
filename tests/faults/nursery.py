"""Runs `sift train` in children that SIGKILL ends at random moments, until the run is done.

Importing torch takes longer than the runs. So this process imports everything once, does nothing
with it, and forks a child for each try: what is killed is a whole `sift train --resume`.

usage: nursery.py RECIPE OUT KILLS SEED [OVERRIDE ...]
"""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import sift_cli.training  # noqa: F401  so that no child has to
from sift_cli.cli import main


def start(recipe: str, out: Path, overrides: list[str]) -> int:
    """A child that trains; its process id."""
    child = os.fork()
    if child:
        return child
    changes = [part for change in overrides for part in ("--set", change)]
    sys.argv = ["sift", "train", recipe, "--out", str(out), "--json", "--resume", *changes]
    quiet = os.open(out.parent / f"{out.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        main()
    except SystemExit as end:
        os._exit(int(end.code or 0))
    os._exit(0)


def saved_step(out: Path) -> int:
    """The step of the newest checkpoint."""
    steps = [re.match(r"step-(\d+)-", path.name) for path in (out / "checkpoint").glob("*")]
    return max((int(found[1]) for found in steps if found), default=0)


def ends_by_itself(child: int, seconds: float) -> int | None:
    """Its exit code where it ends within so many seconds; None otherwise."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def kill_until_done(recipe: str, out: Path, kills: int, rng: random.Random, *changes: str) -> None:
    """Prints one JSON object: what a calm run took, when the kills came, and how the run ended."""
    calm = out.with_name("calm")
    began = time.monotonic()
    code = ends_by_itself(start(recipe, calm, [*changes]), 1e9)
    whole = time.monotonic() - began
    summary = json.loads((calm / "summary.json").read_text())
    ready, steps = whole - summary["train_time_s"], summary["steps"]
    per_step = summary["train_time_s"] / steps
    at: list[int] = []
    codes, equal = [code], True
    while len(at) < kills:
        shutil.rmtree(out, ignore_errors=True)
        while True:
            # from the first import on to somewhat beyond this try's share of what is left
            left = max(1, steps - saved_step(out)) * per_step / max(1, kills - len(at))
            limit = 1e9 if len(at) >= kills else rng.uniform(0, ready + 2 * left)
            child = start(recipe, out, [*changes])
            ended = ends_by_itself(child, limit)
            if ended is not None:
                codes.append(ended)
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            at.append(saved_step(out))
        first, second = (run / "delta.safetensors" for run in (calm, out))
        equal = equal and first.read_bytes() == second.read_bytes()
    found = {
        "kills": len(at),
        "saved_when_killed": at,
        "exit_codes": codes,
        "equal": equal,
        "steps": steps,
        "calm_s": round(whole, 2),
        "resumed_at": json.loads((out / "summary.json").read_text())["resumed_at"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    recipe, out, kills, seed, *changes = sys.argv[1:]
    kill_until_done(recipe, Path(out), int(kills), random.Random(int(seed)), *changes)
