"""Commands that start several processes: what they print, and how they end where one fails."""

import json
import time
from pathlib import Path
from signal import SIGKILL

import pytest

from sift_cli.cli import options
from sift_cli.errors import ExitCode
from sift_cli.recipe import load_recipe
from sift_cli.training import train
from tests.support import forks
from tests.support.command import as_launcher, sift
from tests.support.interruptions import names
from tests.support.ranks import recipes
from tests.support.sharded import FULL

EVERY = "checkpoint.every=2"
RECIPES = {"rows": [EVERY], "chat": [EVERY, FULL, "selection.policy=sift"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipes(tmp_path_factory.mktemp("ranks"))


def test_the_command_starts_them_and_one_of_them_prints(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train", folder / "rows.yaml", "--out", tmp_path / "two", "--devices", 2, "--json"]
    with as_launcher():
        done = sift(*words)
    printed = capfd.readouterr()
    assert done.returncode == 0, printed.err
    assert done.stdout == ""
    assert json.loads(printed.out)["steps"] == 6
    assert printed.err.count("step 6: accuracy") == 1


def test_a_mistake_is_told_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "launch", forks.launch)
    change = "selection.target=[nothing]"
    out = tmp_path / "x"
    done = sift("train", folder / "rows.yaml", "--out", out, "--devices", 2, "--set", change)
    assert done.returncode == 2
    assert done.stderr.count("nothing") == 1
    assert "Traceback" not in done.stderr
    assert not out.exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_where_one_dies_all_end_and_the_last_checkpoint_goes_on(
    recipe: str, folder: Path, tmp_path: Path
) -> None:
    path, out, changes = folder / f"{recipe}.yaml", tmp_path / "run", RECIPES[recipe]
    words = ["train", path, "--out", out, "--device", "cpu"]
    words += [word for change in changes for word in ("--set", change)]
    began = time.monotonic()
    other, killed = forks.forked_together(2, "tests.support.dying", [3, int(SIGKILL), *words])
    assert time.monotonic() - began < 60
    assert (killed.returncode, other.returncode) == (-SIGKILL, ExitCode.BUG)
    assert killed.stderr == ""
    assert other.stderr.count("another process of the run is gone") == 1
    assert "Traceback" not in other.stderr
    assert max(names(out)).startswith("step-00000002-")
    assert train(load_recipe(path, changes), out, resume=True).resumed_at == [2]


@pytest.mark.parametrize("devices", ["0", "two"])
def test_a_number_of_devices_that_is_none_is_refused(folder: Path, devices: str) -> None:
    done = sift("train", folder / "rows.yaml", "--devices", devices)
    assert done.returncode == 2
    assert "--devices" in done.stderr
