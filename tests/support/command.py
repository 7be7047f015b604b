"""Ways to call sift: in this process, in one of its own, and as the fixture `run` does."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from sift_cli.cli import main
from sift_cli.system.launch import THREADS

Run = Callable[..., Path]  # changes to the recipe in, the delta's path out
HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
ENV = {**os.environ, "NO_COLOR": "1", "COLUMNS": "120"}


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def sift(*args: object, cwd: Path | None = None) -> Done:
    """`sift ARGS` in this process, exactly as the console script runs it."""
    return _called(main, ["sift", *map(str, args)], cwd)


def python(module: str, *args: str) -> Done:
    """`python -m MODULE ARGS` in this process, of the modules that a comparison starts."""
    if module == "sift_cli":
        return sift(*args)
    from sift_cli.analysis import adapted  # slow to import

    return _called(partial(adapted.main, list(args)), [module, *args])


def job_here(_: object, command: list[str]) -> tuple[int, str]:
    """In place of `Runner._process`: exit code and errors of a run that is made in this process."""
    done = python(*command[2:])
    return done.returncode, done.stderr


def _called(run: Callable[[], None], words: list[str], cwd: Path | None = None) -> Done:
    out, err, code, before = io.StringIO(), io.StringIO(), 0, Path.cwd()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", words)
        patch.setenv("COLUMNS", "120")
        patch.chdir(cwd or before)
        try:
            run()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


@contextmanager
def as_launcher() -> Iterator[None]:
    """Within it a launcher of torch's may take this process's signals, and set variables."""
    before = {one: signal.getsignal(one) for one in HEARD}
    with pytest.MonkeyPatch.context() as patch:
        for name in (THREADS, "OMP_NUM_THREADS"):
            patch.setenv(name, "1")
        yield
    for one, handler in before.items():
        signal.signal(one, handler)


def until(holds: Callable[[], bool]) -> None:
    """Waits for it, two minutes at most."""
    deadline = time.monotonic() + 120
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.1)


def process(*args: object) -> subprocess.CompletedProcess[str]:
    """`sift ARGS` in a process of its own."""
    command = [sys.executable, "-m", "sift_cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, check=False)
