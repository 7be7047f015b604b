"""Ways to call sift: in this process, in one of its own, and as the fixture `run` does."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from sift_cli.cli import main

Run = Callable[..., Path]  # changes to the recipe in, the delta's path out
ENV = {**os.environ, "NO_COLOR": "1", "COLUMNS": "120"}


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def sift(*args: object, cwd: Path | None = None) -> Done:
    """`sift ARGS` in this process, exactly as the console script runs it."""
    out, err, code, before = io.StringIO(), io.StringIO(), 0, Path.cwd()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["sift", *map(str, args)])
        patch.setenv("COLUMNS", "120")
        patch.chdir(cwd or before)
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def until(holds: Callable[[], bool]) -> None:
    """Waits for it, two minutes at most."""
    deadline = time.monotonic() + 120
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.1)


def process(*args: object) -> subprocess.CompletedProcess[str]:
    """`sift ARGS` in a process of its own."""
    command = [sys.executable, "-m", "sift_cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, check=False)
