"""Processes that are started together: how they end, and with which exit code."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sift_cli.errors import ExitCode
from sift_cli.system.launch import NAMES, launch, launched
from tests.support.command import as_launcher

ENDS = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    exec(sys.argv[1])
else:
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Starts two processes: the second runs some code, the first sleeps; gives the exit code."""
    (tmp_path / "ends.py").write_text(ENDS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with as_launcher():
        yield lambda code, sleep="60": launch(2, "ends", [code, sleep])


def test_all_end_well(two: Callable[..., int]) -> None:
    assert two("pass", "0") == 0


def test_the_exit_code_is_that_of_the_first_to_fail(
    two: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert two("print('so', file=sys.stderr); sys.exit(3)") == 3
    assert time.monotonic() - began < 30
    assert capfd.readouterr().err == "so\n"


def test_a_process_that_is_killed_is_told(
    two: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert two("os.kill(os.getpid(), signal.SIGKILL)") == ExitCode.BUG
    assert capfd.readouterr().err == "a process of the run was ended by signal 9\n"


def test_a_signal_ends_all(two: Callable[..., int]) -> None:
    assert two("os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)") == ExitCode.INTERRUPTED


def test_what_a_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert launched().world == 1
    for name, value in zip(NAMES, ("2", "4", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert (launched().rank, launched().world, launched().local) == (2, 4, 0)
    assert not launched().main
