"""Devices: what is said where there are fewer than asked for."""

import pytest

from sift_cli.models.devices import cores_here
from tests.support.command import sift


def test_more_processes_than_cores_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sift_cli.cli.options.launch", lambda *_: 0)
    count = cores_here() + 1
    done = sift("train", "glue/rte", "--devices", count, "--device", "cpu")
    assert f"--devices {count}: there are {count - 1} cores" in done.stderr
    assert "cores" not in sift("train", "glue/rte", "--devices", 2, "--device", "cpu").stderr
