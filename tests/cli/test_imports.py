"""What a command imports: what is slow to import is there only where it is used."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import ENV, Run

# What transformers brings with any model goes with it.
WITH_MODELS = {"torch", "torch._dynamo", "sympy", "accelerate", "transformers"}
WITH_ROWS = {"datasets", "pandas", "pyarrow", "scipy", "scipy.sparse"}  # datasets patches scipy.io
WITH_SCHEDULES = {"peft"}  # those of transformers, where PEFT is installed; it brings BLOOM
HEAVY = (
    WITH_MODELS
    | WITH_ROWS
    | {
        *("sklearn", "scipy.optimize", "scipy.stats", "matplotlib"),
        *WITH_SCHEDULES,
        *("trl", "torchvision", "tensorboard", "wandb", "lm_eval", "transformers.trainer"),
    }
)
SAY = f"""
import sys
def say():
    families = [one for one in sys.modules if one.startswith("transformers.models.")]
    models = [one.rpartition(".modeling_")[2] for one in families if ".modeling_" in one]
    print("imported", *(one for one in {sorted(HEAVY)} if one in sys.modules), *models)
"""
COMMAND = """
from sift_cli.cli import main
try:
    main()
finally:
    say()
"""
# At the first step: metrics of classes and the report's plots come when all steps are done.
TRAINING = """
from sift_cli.system.late import wait_for_calls
wait_for_calls()
from sift_cli.cli import main
from sift_cli.training import loop
def first(*args, step=loop.take_step, **more):
    say()
    sys.exit()
loop.take_step = first
main()
"""


def imported(program: str, *args: object) -> set[str]:
    """The modules of HEAVY that a program has imported when it says so, and architectures."""
    command = [sys.executable, "-c", SAY + program, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, check=False)
    assert done.returncode == 0, done.stderr
    said = next(one for one in done.stdout.splitlines() if one.startswith("imported"))
    return set(said.split()[1:])


def test_a_delta_brings_torch_alone() -> None:
    assert imported("from sift_cli import Delta\nsay()") == {"torch"}


@pytest.mark.parametrize("command", ["predict", "inspect"])
def test_a_command_on_a_delta_brings_its_own_model_alone(command: str, run: Run) -> None:
    delta = run()
    args = ("a good film",) if command == "predict" else ()
    found = imported(COMMAND, command, delta, *args)
    assert "transformers" in found
    assert ("bert" in found) == (command == "predict")  # the other reads the file alone
    assert found <= WITH_MODELS | {"auto", "bert"}


def test_training_up_to_its_first_step_brings_models_and_rows(
    recipe_file: Path, tmp_path: Path
) -> None:
    found = imported(TRAINING, "train", recipe_file, "--out", tmp_path / "run")
    assert {"datasets", "bert"} <= found
    assert found <= WITH_MODELS | WITH_ROWS | WITH_SCHEDULES | {"auto", "bert", "bloom"}
