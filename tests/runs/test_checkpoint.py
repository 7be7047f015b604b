"""Runs that stop at some step and go on: to the same bytes as if nothing had come between."""

import dataclasses
import json
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sift_cli.errors import ExitCode, SiftError
from sift_cli.recipe import load_recipe, parse_recipe
from sift_cli.runs.facts import Facts, differences, settings_of
from sift_cli.runs.folder import CHECKPOINTS
from sift_cli.training import train
from tests.support.command import sift
from tests.support.interruptions import (
    SELECTIONS,
    Killed,
    at_call,
    delta,
    kill,
    killed_at,
    names,
    signalled,
)
from tests.support.models import save_base
from tests.support.rows import write_rows

Patch = pytest.MonkeyPatch


@pytest.fixture
def dropping(base: Path) -> Path:
    """The base with dropout, so that random states matter."""
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    (base / "config.json").write_text(json.dumps(config))
    return base


CASES = [(name, "bfloat16") for name in SELECTIONS]  # where masters and weights are two things
CASES += [(name, "float32") for name in ("first-batch", "park-revert", "everything")]
SCALED = ["train.step_scale=input", "train.weight_decay=0.1", "train.decay_toward=base"]
CASES = [(*case, []) for case in CASES]
CASES += [(name, "bfloat16", SCALED) for name in ("first-batch", "park-revert")]


@pytest.mark.parametrize(("selection", "dtype", "more"), CASES)
def test_a_resumed_run_gives_the_same_delta(
    selection: str, dtype: str, more: list[str], dropping: Path, recipe_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            *more,
            f"model.dtype={dtype}",
            f"selection={SELECTIONS[selection]}",
            "train.epochs=2",  # of 6 steps; the first checkpoint lies within the first epoch
            "train.batch_size=4",
            "train.accumulate=2",
            "eval.every=3",
            "log.every=1",
            "checkpoint.every=4",
        ],
    )
    calm = train(recipe, tmp_path / "calm")
    out = tmp_path / "rough"
    killed_at(7, recipe, out)
    killed_at(5, recipe, out, resume=True)  # step 9 of the run, after the checkpoint of step 8
    summary = train(recipe, out, resume=True)
    assert delta(out) == delta(tmp_path / "calm")
    same = {"metrics", "metrics_before", "steps", "kept_step", "delta_sha256", "trained_entries"}
    assert [getattr(summary, key) for key in same] == [getattr(calm, key) for key in same]
    assert summary.resumed_at == [4, 8]
    assert not (out / CHECKPOINTS).exists()

    def logged(run: Path) -> list[dict[str, object]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        timed = ("step_time_ms", "rows_per_second")
        return [{k: v for k, v in line.items() if k not in timed} for line in lines]

    assert logged(out) == logged(tmp_path / "calm")
    assert len(logged(out)) == 12 + 4
    known = tmp_path / "calm/gradient.jsonl"
    assert (out / known.name).is_file() == known.is_file()
    if known.is_file():
        assert (out / known.name).read_bytes() == known.read_bytes()


def test_every_step_is_a_place_to_stop(dropping: Path, recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        ["selection.policy=drop-grow", "selection.every=2", "eval.every=4", "train.epochs=1.5"],
    )
    train(recipe, tmp_path / "calm")
    for step in (1, 2, 3, 4, 5, 6, 9):
        out = tmp_path / str(step)
        with (
            at_call(step, lambda: os.kill(os.getpid(), signal.SIGTERM)),
            pytest.raises(SiftError, match=f"after step {step} of 9"),
        ):
            train(recipe, out)
        assert sorted(name[:13] for name in names(out)) == ["step-00000000", f"step-{step:08}"]
        train(recipe, out, resume=True)
        assert delta(out) == delta(tmp_path / "calm")


@pytest.fixture
def hearing() -> Iterator[None]:
    """SIGINT is heard; tests in the background of a shell are started deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_130_and_handlers_come_back(
    number: signal.Signals, recipe_file: Path, tmp_path: Path, hearing: None
) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with at_call(2, signalled(number)), pytest.raises(SiftError) as caught:
        train(load_recipe(recipe_file), tmp_path / "run")
    assert caught.value.code == ExitCode.INTERRUPTED
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    assert not (tmp_path / "run/summary.json").exists()


def test_a_signal_breaks_an_evaluation_off_and_it_is_made_up_for(
    recipe_file: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    from sift_cli.runs import session

    recipe = load_recipe(recipe_file, ["train.epochs=2"])
    train(recipe, tmp_path / "calm")
    real, calls = session.collect_outputs, iter(range(1, 100))

    def interrupted(*args: object, **more: object) -> object:
        if next(calls) == 2:  # the first is that before training
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the evaluation went on")
        return real(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "collect_outputs", interrupted)
    with pytest.raises(SiftError, match="after step 6 of 12"):
        train(recipe, tmp_path / "run")
    summary = train(recipe, tmp_path / "run", resume=True)
    assert delta(tmp_path / "run") == delta(tmp_path / "calm")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"metrics"' in line] == [6, 12]
    assert summary.resumed_at == [6]


def test_a_second_signal_ends_at_once(recipe_file: Path, tmp_path: Path, hearing: None) -> None:
    with at_call(2, signalled(signal.SIGINT, signal.SIGINT)), pytest.raises(KeyboardInterrupt):
        train(load_recipe(recipe_file), tmp_path / "run")


def test_the_last_two_are_kept_and_a_damaged_one_is_passed_over(
    recipe_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file, ["checkpoint.every=1", "train.epochs=2"])
    train(recipe, tmp_path / "calm")
    out = tmp_path / "run"
    killed_at(8, recipe, out)
    older, newer = sorted((out / CHECKPOINTS).iterdir())
    assert older.name.startswith("step-00000006-")
    assert newer.name.startswith("step-00000007-")
    raw = bytearray(newer.read_bytes())
    raw[len(raw) // 2] ^= 1
    newer.write_bytes(raw)
    console = Console(record=True, width=300)
    with at_call(2, kill), pytest.raises(Killed):
        train(recipe, out, resume=True, console=console)
    said = console.export_text()
    assert f"{newer} is damaged" in said
    assert "resuming after step 6 of 12" in said
    kept = sorted(path.name[:13] for path in (out / CHECKPOINTS).iterdir())
    assert kept == ["step-00000006", "step-00000007"]
    for path in (out / CHECKPOINTS).iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SiftError, match="every checkpoint is damaged") as caught:
        train(recipe, out, resume=True)
    assert caught.value.code == ExitCode.WRONG_FILE
    train(recipe, out, overwrite=True)
    assert delta(out) == delta(tmp_path / "calm")


def test_another_recipe_is_refused_with_what_differs(recipe_file: Path, tmp_path: Path) -> None:
    killed_at(3, load_recipe(recipe_file, ["checkpoint.every=1"]), tmp_path / "run")
    other = ["train.learning_rate=0.5", "eval.every=2"]
    with pytest.raises(SiftError) as caught:
        train(load_recipe(recipe_file, other), tmp_path / "run", resume=True)
    assert caught.value.code == ExitCode.USAGE
    assert "train.learning_rate: it was 0.01, now it is 0.5" in str(caught.value)
    assert "eval.every: it was epoch, now it is 2" in str(caught.value)
    free = load_recipe(recipe_file, ["checkpoint.every=2", "log.every=1", "out=elsewhere"])
    assert train(free, tmp_path / "run", resume=True).steps == 6
    with pytest.raises(SiftError, match=r"train.learning_rate: it was 0.01, now it is 0.5"):
        train(load_recipe(recipe_file, other), tmp_path / "run", resume=True)


def test_a_checkpoint_of_a_version_that_knew_fewer_keys_goes_on(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    here = Facts(1, settings_of(recipe), {}, {}, "cpu", {})
    older = json.loads(json.dumps(here.recipe))
    del older["train"]["step_scale"], older["selection"]["vectors"]
    there = dataclasses.replace(here, recipe=older)
    assert not differences(there, here).refuse
    changes = ["train.step_scale=input", "train.head_start=prior"]
    other = dataclasses.replace(here, recipe=settings_of(load_recipe(recipe_file, changes)))
    assert len(differences(there, other).refuse) == 2


def test_other_data_and_another_base_are_refused(
    recipe_file: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file, ["checkpoint.every=1"])
    killed_at(3, recipe, tmp_path / "run")
    held = (data / "train.jsonl").read_text()
    write_rows(data / "train.jsonl", 48, seed=9)
    with pytest.raises(SiftError, match="training of the data: it was 48 rows, ") as caught:
        train(recipe, tmp_path / "run", resume=True)
    assert caught.value.code == ExitCode.USAGE
    (data / "train.jsonl").write_text(held)
    save_base(base, seed=5)
    with pytest.raises(SiftError, match=r"the base: \d+ tensors differ: bert") as caught:
        train(recipe, tmp_path / "run", resume=True)
    assert caught.value.code == ExitCode.WRONG_FILE


def test_a_folder_with_an_interrupted_run_asks_what_to_do(
    recipe_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file, ["checkpoint.every=1"])
    killed_at(4, recipe, tmp_path / "run")
    with pytest.raises(SiftError, match=r"after step 3; go on with --resume, or begin anew with"):
        train(recipe, tmp_path / "run")
    train(recipe, tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / CHECKPOINTS).exists()


@pytest.mark.parametrize("file", ["", "/delta.safetensors"])
def test_a_run_that_has_not_finished_is_known_to_other_commands(
    file: str, recipe_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file, ["checkpoint.every=2"])
    run = tmp_path / "run"
    killed_at(4, recipe, run)
    again = ["train", str(run / "recipe.yaml"), "--out", str(run), "--resume"]
    for command in (["eval"], ["predict"], ["inspect"], ["merge"]):
        more = {"predict": ["good film"], "merge": ["--out", tmp_path / "merged"]}
        done = sift(*command, f"{run}{file}", *more.get(command[0], []))
        assert done.returncode == 2, command
        said = f"has not finished, of which step 2 is saved; go on with sift {shlex.join(again)}"
        assert said in done.stderr, command
    assert sift(*again).returncode == 0
    assert sift("inspect", run).returncode == 0


def test_resuming_without_a_checkpoint_starts_and_a_finished_run_stays(
    recipe_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file, ["checkpoint.every=null"])
    killed_at(3, recipe, tmp_path / "run")
    console = Console(record=True, width=300)
    summary = train(recipe, tmp_path / "run", resume=True, console=console)
    assert "holds no checkpoint; starting from the beginning" in console.export_text()
    assert summary.resumed_at == []
    before = (tmp_path / "run/summary.json").stat().st_mtime_ns
    again = train(recipe, tmp_path / "run", resume=True, console=console)
    assert again == summary
    assert (tmp_path / "run/summary.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("selection", ["warmed-up", "park", "first-batch"])
def test_what_was_chosen_is_saved_before_the_first_step(
    selection: str, dropping: Path, recipe_file: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    from sift_cli.training.choosing import Chooser

    recipe = load_recipe(recipe_file, [f"selection={SELECTIONS[selection]}", "train.epochs=2"])
    train(recipe, tmp_path / "calm")
    killed_at(1, recipe, tmp_path / "run")
    monkeypatch.setattr(Chooser, "begin", None)  # neither warms up nor chooses again
    assert train(recipe, tmp_path / "run", resume=True).resumed_at == [0]
    assert delta(tmp_path / "run") == delta(tmp_path / "calm")


def test_checkpoints_by_time(recipe_file: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    from sift_cli.runs import checkpoint

    clock = iter(range(0, 10**6, 40))
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: next(clock))
    recipe = load_recipe(recipe_file, ["checkpoint.every=1min"])
    killed_at(4, recipe, tmp_path / "run")
    steps = sorted(name[:13] for name in names(tmp_path / "run"))
    assert steps == ["step-00000000", "step-00000002"]


@pytest.mark.parametrize(
    ("every", "seconds"), [("90s", 90), ("10min", 600), ("2h", 7200), (500, None), ("null", None)]
)
def test_intervals(recipe_text: str, every: object, seconds: int | None) -> None:
    recipe = parse_recipe(recipe_text, "r", [f"checkpoint.every={every}"])
    assert recipe.checkpoint.seconds == seconds
    assert parse_recipe(recipe.to_yaml(), "again").checkpoint == recipe.checkpoint


@pytest.mark.parametrize("every", ["0", "-1", "10 days", "0min", "true", "1.5", "[1]", "min"])
def test_intervals_that_are_none(recipe_text: str, every: str) -> None:
    with pytest.raises(SiftError, match=r"checkpoint.every: give a number of steps, or a time"):
        parse_recipe(recipe_text, "r", [f"checkpoint.every={every}"])


def test_a_checkpoint_holds_trained_entries_alone(recipe_file: Path, tmp_path: Path) -> None:
    killed_at(3, load_recipe(recipe_file, ["checkpoint.every=2"]), tmp_path / "run")
    from safetensors.torch import load_file

    path = sorted((tmp_path / "run" / CHECKPOINTS).iterdir())[-1]
    tensors = load_file(path)
    entries = len(tensors["masters"])
    fixed = {"random/cpu", "step_ms", "optimizer/step"}
    held = sum(one.nbytes for name, one in tensors.items() if name not in fixed)
    assert held <= (4 + 8 + 2) * entries  # masters, moments, coded positions
    assert torch.equal(tensors["optimizer/step"], torch.tensor(2.0))


@pytest.mark.gpu
@pytest.mark.parametrize("selection", ["first-batch", "park", "drop-grow"])
def test_a_resumed_run_gives_the_same_delta_on_a_gpu(
    selection: str, dropping: Path, recipe_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(
        recipe_file, [f"selection={SELECTIONS[selection]}", "checkpoint.every=2", "train.epochs=2"]
    )
    train(recipe, tmp_path / "calm", device="cuda")
    with at_call(8, kill), pytest.raises(Killed):
        train(recipe, tmp_path / "run", device="cuda")
    train(recipe, tmp_path / "run", device="cuda", resume=True)
    assert delta(tmp_path / "run") == delta(tmp_path / "calm")
