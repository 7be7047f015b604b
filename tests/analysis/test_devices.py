"""`sift compare --devices 2`: two processes share the run of each method, and it is that of one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sift_cli.analysis import adapted
from sift_cli.analysis.jobs import Runner
from sift_cli.cli import options
from sift_cli.runs.folder import TRAINED_FILE
from sift_cli.runs.summary import Summary
from sift_cli.runs.tuned import load_tuned
from tests.support import forks
from tests.support.command import job_here, sift
from tests.support.ranks import recipes

METHODS = ("sift", "lora", "shira", "full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process each comes to, in `1`, and what two do, in `2`."""
    folder = recipes(tmp_path_factory.mktemp("compared"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "_process", job_here)
        for module in (options, adapted):
            patch.setattr(module, "launch", forks.launch)
        for devices in (1, 2):
            given = ["--methods", ",".join(METHODS), "--seeds", 1, "--devices", devices]
            done = sift("compare", folder / "dropping.yaml", *given, "--out", folder / str(devices))
            assert done.returncode == 0, done.stderr
    return folder


def run_of(folder: Path, method: str, devices: int) -> Path:
    (run,) = (folder / str(devices) / "runs").glob(f"{method}-*")
    return run


def trained(run: Path) -> dict[str, Tensor]:
    """All weights where a delta changes them, else those that trained."""
    if (run / TRAINED_FILE).exists():
        return load_file(run / TRAINED_FILE)
    return dict(load_tuned(str(run), None)[0].model.named_parameters())


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of SHiRA's sparse tensors
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_make_the_run_of_one(method: str, folder: Path) -> None:
    runs = [run_of(folder, method, devices) for devices in (1, 2)]
    summaries = [Summary.read(run) for run in runs]
    assert [one.devices for one in summaries] == [None, 2]
    assert summaries[0].metrics == pytest.approx(summaries[1].metrics, rel=1e-5)
    one, two = map(trained, runs)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        if "key.bias" in name:  # its gradient is nothing but rounding, and Adam's step its sign
            continue
        torch.testing.assert_close(weight, two[name], rtol=0, atol=1e-5)
