"""Where the numbers of a run go."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from sift_cli.errors import SiftError
from sift_cli.recipe import load_recipe
from sift_cli.runs.sinks import Bar, JsonLines, WandB
from sift_cli.training import train

STEP = {"step": 3, "steps": 9, "loss": 0.25, "rows_per_second": 12.0}
EVALUATION = {"step": 3, "metrics": {"accuracy": 0.5}, "best": True}


def test_tensorboard_gets_every_number(recipe_file: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(load_recipe(recipe_file, ["log.tensorboard=true", "log.every=2"]), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert {"loss", "learning_rate", "metrics/accuracy"} <= set(events.Tags()["scalars"])
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"metrics"' not in line]
    assert [one.value for one in events.Scalars("loss")] == pytest.approx(losses)


def test_wandb_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder:
        id = "abc"

        def __init__(self) -> None:
            self.seen: list[object] = []

        def init(self, **given: object) -> "Recorder":
            self.seen.append(given["config"])
            self.given = given
            return self

        def log(self, numbers: dict[str, float], step: int) -> None:
            self.seen.append((step, numbers))

        def finish(self) -> None:
            self.seen.append("finished")

    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    sink = WandB(tmp_path / "wandb.id", {"a": 1})
    sink.log(EVALUATION)
    sink.close()
    assert recorder.seen[0] == {"a": 1}
    assert recorder.seen[1][0] == 3
    assert recorder.seen[1][1]["metrics/accuracy"] == 0.5
    assert recorder.seen[2] == "finished"
    assert "id" not in recorder.given
    WandB(tmp_path / "wandb.id", {"a": 1}, after=3)
    assert recorder.given["id"] == "abc"


def test_a_resumed_run_goes_on_in_the_same_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 0.5} for step in range(1, 6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    sink = JsonLines(path, after=3)
    sink.log({"step": 4, "loss": float("nan")})
    sink.close()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found == [*lines[:3], {"step": 4, "loss": None}]
    JsonLines(path).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_the_way_out(
    name: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SiftError, match=rf"pip install 'sift-cli\[{name}\]'"):
        train(load_recipe(recipe_file, [f"log.{name}=true"]), tmp_path / "run")


def test_the_bar_shows_loss_metric_and_speed_on_a_terminal() -> None:
    file = io.StringIO()
    bar = Bar(Console(file=file, force_terminal=True, width=140, color_system=None))
    bar.log(EVALUATION)
    bar.log(STEP)
    bar.close()
    shown = file.getvalue()
    assert "step 3: accuracy 0.5000  (best)" in shown
    assert "loss 0.2500" in shown
    assert "12 rows/s" in shown
    assert "3/9" in shown


def test_the_bar_is_plain_lines_elsewhere() -> None:
    file = io.StringIO()
    bar = Bar(Console(file=file))
    bar.log(STEP)
    bar.log(EVALUATION)
    for step in (4, 5):  # a line for each tenth of the steps
        bar.log({**STEP, "step": step, "steps": 40})
    bar.log({**STEP, "step": 5})  # what was held out is of step 3
    bar.close()
    assert file.getvalue().splitlines() == [
        "step 3 of 9: loss 0.2500  12 rows/s",
        "step 3: accuracy 0.5000  (best)",
        "step 5 of 9: loss 0.2500  12 rows/s",
    ]


def test_plain_lines_come_with_each_tenth() -> None:
    file = io.StringIO()
    bar = Bar(Console(file=file))
    for step in range(1, 41):
        bar.log({**STEP, "step": step, "steps": 40})
    bar.close()
    said = [line.split(":")[0] for line in file.getvalue().splitlines()]
    assert said == [f"step {step} of 40" for step in range(4, 41, 4)]


def test_a_quiet_console_shows_nothing() -> None:
    file = io.StringIO()
    bar = Bar(Console(file=file, quiet=True))
    bar.log(STEP)
    bar.log(EVALUATION)
    bar.close()
    assert file.getvalue() == ""
