"""Devices: what is said of a machine on which others work."""

import os
from io import StringIO

import pytest
import torch
from rich.console import Console

from sift_cli.models.devices import cores_here, tell_busy
from tests.support.command import sift


def said_at(load: float, monkeypatch: pytest.MonkeyPatch, threads: int = 2) -> str:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    said = StringIO()
    tell_busy(torch.device("cpu"), Console(file=said, width=200))
    return said.getvalue()


def test_threads_that_wait_for_others_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = cores_here()
    assert f"keeps the {cores} cores busy" in said_at(1.6 * cores, monkeypatch)
    assert said_at(1.4 * cores, monkeypatch) == ""
    assert said_at(1.6 * cores, monkeypatch, threads=1) == ""


def test_more_processes_than_cores_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sift_cli.cli.options.launch", lambda *_: 0)
    count = cores_here() + 1
    done = sift("train", "glue/rte", "--devices", count, "--device", "cpu")
    assert f"--devices {count}: there are {count - 1} cores" in done.stderr
    assert "cores" not in sift("train", "glue/rte", "--devices", 2, "--device", "cpu").stderr
