"""The command line as a user meets it: output, exit codes, files."""

import fcntl
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import typer
from safetensors.torch import load_file

from sift_cli.cli import app
from tests.support.command import ENV, process, sift, until
from tests.support.models import save_base
from tests.support.rows import write_rows


@pytest.fixture
def trained(recipe_file: Path, tmp_path: Path) -> Path:
    done = sift("train", recipe_file, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def test_help_imports_no_torch() -> None:
    code = "import sys, sift_cli.cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    done = process("--help")
    assert done.returncode == 0
    for command in ("train", "eval", "merge", "predict", "env", "recipes"):
        assert command in done.stdout
    assert sift("--version").stdout.strip()[0].isdigit()


def test_json_is_all_that_stdout_holds(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    done = sift("eval", trained, "--json")
    found = json.loads(done.stdout)
    assert found["metrics"] == summary["metrics"]
    assert found.keys() == {"metrics", "classes"}
    done = sift("eval", trained / "delta.safetensors", "--split", "train", "--json")
    assert json.loads(done.stdout)["metrics"].keys() == summary["metrics"].keys()


def test_train_merge_eval_predict(trained: Path, recipe_file: Path, tmp_path: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    merged = tmp_path / "merged"
    done = sift("merge", trained / "delta.safetensors", "--out", merged)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "one bit for bit Read back from disk, every tensor is as written." in said
    assert "Reloaded, logits differ by 0." in said
    for extra in ([], ["--recipe", recipe_file]):
        done = sift("eval", merged, *extra, "--json")
        assert json.loads(done.stdout)["metrics"] == summary["metrics"]
    done = sift("predict", merged, "good film", "bad film", "--json")
    predictions = json.loads(done.stdout)["predictions"]
    assert [one["text"] for one in predictions] == ["good film", "bad film"]
    assert {one["label"] for one in predictions} <= {"negative", "positive"}
    assert all(0.5 <= one["probability"] <= 1 for one in predictions)
    done = sift(
        "merge",
        trained / "delta.safetensors",
        "--base",
        merged,
        "--undo",
        "--out",
        tmp_path / "back",
    )
    assert done.returncode == 0, done.stderr
    assert "classifier.weight" not in load_file(tmp_path / "back/model.safetensors")


def test_predict_takes_as_many_texts_as_a_row_had(
    trained: Path, recipe_file: Path, data: Path, tmp_path: Path
) -> None:
    done = sift("predict", trained, "good film", "--pair", "bad film")
    assert done.returncode == 2
    assert "was trained on one text (sentence); leave --pair out" in done.stderr
    for name in ("train", "validation"):
        write_rows(data / f"{name}.jsonl", 16, seed=1, pair=True)
    changes = ["data.task=custom", "data.text=[sentence, other]", "data.label=label"]
    pairs = [part for one in [*changes, "train.max_steps=1"] for part in ("--set", one)]
    assert sift("train", recipe_file, *pairs, "--out", tmp_path / "two").returncode == 0
    done = sift("predict", tmp_path / "two", "good film")
    assert done.returncode == 2
    assert "pairs of texts (sentence, other); give the second of each with --pair" in done.stderr
    assert sift("predict", tmp_path / "two", "good film", "--pair", "bad").returncode == 0


def test_predict_shows_a_score_without_an_empty_column(
    recipe_file: Path, data: Path, tmp_path: Path
) -> None:
    for file in data.iterdir():
        file.write_text(file.read_text().replace('"label": 1', '"label": 1.5'))
    changes = ["data.task=custom", "data.text=sentence", "data.label=label", "train.max_steps=1"]
    options = [part for one in changes for part in ("--set", one)]
    assert sift("train", recipe_file, *options, "--out", tmp_path / "run").returncode == 0
    lines = sift("predict", tmp_path / "run", "good film").stdout.splitlines()
    assert lines[0] == "text\tscore"
    assert re.fullmatch(r"good film\t-?\d+\.\d{4}", lines[1])


def test_what_train_prints(recipe_file: Path, tmp_path: Path) -> None:
    done = sift("train", recipe_file, "--set", "train.max_steps=2", "--seed", 9, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 2: accuracy 0." in done.stderr
    assert "before" in done.stdout
    assert "entries trained" in done.stdout
    summary = json.loads((tmp_path / "runs/tiny/summary.json").read_text())
    assert summary["seed"] == 9
    again = sift("train", recipe_file, "--set", "train.max_steps=2", cwd=tmp_path)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def test_where_no_one_watches_lines_are_plain(recipe_file: Path, tmp_path: Path) -> None:
    done = sift("train", recipe_file, "--set", "train.max_steps=2", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0] == "metric (sst2)\tbefore\tafter"
    assert re.fullmatch(r"accuracy\t0\.\d{4}\t0\.\d{4}", lines[1])
    assert lines[2].startswith("loss\t")
    assert len(lines) == 7
    assert lines[-1] == "Next: sift merge runs/tiny/delta.safetensors --out runs/tiny/merged"
    assert not re.search("[\x1b\u2500-\u257f]", done.stdout + done.stderr)
    done = sift("predict", tmp_path / "runs/tiny", "a [red]good[/red] film")
    assert done.stdout.splitlines()[1].startswith("a [red]good[/red] film\t")


def test_quiet_prints_results_and_errors_only(recipe_file: Path, tmp_path: Path) -> None:
    done = sift("train", recipe_file, "-q", "--out", tmp_path / "run")
    assert done.returncode == 0
    assert done.stderr == ""
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [
        "metric (sst2)",
        "accuracy",
        "loss",
    ]
    assert "--overwrite" in sift("train", recipe_file, "-q", "--out", tmp_path / "run").stderr


def on_a_terminal(*args: object, **env: str) -> str:
    """What `sift ARGS` shows on a terminal of 80 columns."""
    screen, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    without = {key: value for key, value in ENV.items() if key not in ("NO_COLOR", "COLUMNS")}
    command = [sys.executable, "-m", "sift_cli", *map(str, args)]
    with subprocess.Popen(
        command, stdin=end, stdout=end, stderr=end, env={**without, "TERM": "xterm-256color", **env}
    ) as run:
        os.close(end)
        shown = b""
        try:
            while more := os.read(screen, 1 << 16):
                shown += more
        except OSError:  # the other side is closed
            pass
        assert run.wait() == 0
    os.close(screen)
    return shown.decode()


COLOUR = r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7])(?:;\d+)*m"


def test_a_terminal_shows_a_bar_and_ten_lines_at_most(recipe_file: Path, tmp_path: Path) -> None:
    metrics = "data.metrics=[accuracy, f1, f1_macro, matthews]"
    args = ["train", recipe_file, "--out", tmp_path / "r", "--set", metrics, "--set", "log.every=1"]
    shown = on_a_terminal(*args)
    assert re.search(COLOUR, shown)
    assert "training" in shown
    assert "6/6" in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    summary = plain[plain.rindex("metric (sst2)") :].strip().splitlines()
    assert len(summary) <= 10
    assert "Next: sift merge" in "".join(summary)
    shown = on_a_terminal("eval", tmp_path / "r", NO_COLOR="1")
    assert "accuracy" in shown
    assert not re.search(COLOUR, shown)


def test_help_has_an_example_for_each_command() -> None:
    group = typer.main.get_command(app)
    leaves = {}
    for name, one in group.commands.items():
        inner = getattr(one, "commands", None)
        leaves |= {f"{name} {leaf}": made for leaf, made in inner.items()} if inner else {name: one}
    for name, command in leaves.items():
        assert f"Example: sift {name}" in (command.help or ""), name
    shown = sift("train", "--help").stdout
    assert "Example: sift train glue/rte" in " ".join(shown.split())


def test_shells_complete_commands() -> None:
    env = {**ENV, "_SIFT_COMPLETE": "complete_bash", "COMP_WORDS": "sift pr", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "sift_cli"], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["predict", "probe"]


def test_three_mistakes_three_lines(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "model: {path: x}\ndata: {path: y, task: rte}\ntrain:\n  epoch: 3\n  batch_size: -1\n"
        "selecton: {policy: sift}\n"
    )
    done = sift("train", bad)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert f"{bad}:4:3 train.epoch: unknown key; did you mean train.epochs?" in lines
    assert f"{bad}:6:1 selecton: unknown key; did you mean selection?" in lines
    assert any(line.startswith(f"{bad}:5:3 train.batch_size: ") for line in lines)


def test_damaged_delta_and_wrong_base_exit_with_3(trained: Path, tmp_path: Path) -> None:
    delta = trained / "delta.safetensors"
    raw = bytearray(delta.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(raw)
    other = save_base(tmp_path / "other", seed=5)
    for args in ([damaged], [delta, "--base", other]):
        done = sift("merge", *args, "--out", tmp_path / "merged")
        assert done.returncode == 3
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "merged").exists()


def test_a_loss_that_is_not_finite_exits_with_4(recipe_file: Path, tmp_path: Path) -> None:
    extreme = ["--set", "train.learning_rate=1e30", "--set", "train.warmup=0"]
    extreme += ["--set", "train.lr_schedule=constant", "--set", "eval.every=100"]
    done = sift("train", recipe_file, *extreme, "--out", tmp_path / "run")
    assert done.returncode == 4, done.stderr
    assert "step " in done.stderr
    assert "training rows [" in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["eval", "nowhere/at/all"], "no such folder"),
        (["merge", "no.safetensors", "--out", "x"], "no such delta file"),
        (["predict", "{base}", "a", "b", "--pair", "c"], "give one for each"),
        (["eval", "{base}"], "has not been trained for this task"),
        (["train", "{recipe}", "--device", "tpu"], "no such device"),
        (["train", "{recipe}", "--set", "data.text=[nope]"], "no column 'nope'; it has"),
        (["train", "{recipe}", "--set", "selection.target=[qery]"], "matches 'qery'"),
        (["train", "{recipe}", "--set", "data.max_length=4096"], "takes 32 tokens"),
        (["train", "{recipe}", "--set", "model.path=./nope"], "no such folder"),
        (["recipes", "show", "nope"], "no shipped recipe"),
        (["train"], "Missing argument"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    args: list[str], said: str, base: Path, recipe_file: Path, tmp_path: Path
) -> None:
    filled = [arg.format(base=base, recipe=recipe_file) for arg in args]
    done = sift(*filled, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = process("--debug", "merge", tmp_path / "no.safetensors", "--out", tmp_path / "x")
    assert "Traceback" in done.stderr


def test_recipes_and_env(tmp_path: Path) -> None:
    listed = sift("recipes", "ls").stdout
    assert "quickstart" in listed
    assert "glue/stsb" in listed
    shown = sift("recipes", "show", "glue/rte").stdout
    assert sift("recipes", "cp", "glue/rte", cwd=tmp_path).returncode == 0
    assert shown.splitlines()[0] in (tmp_path / "rte.yaml").read_text()
    assert sift("recipes", "cp", "glue/rte", cwd=tmp_path).returncode == 2
    found = json.loads(sift("env", "--json").stdout)
    assert {"sift", "torch", "transformers", "python", "cuda"} <= found.keys()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_exits_with_130_and_says_how_to_go_on(
    number: signal.Signals, recipe_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "sift_cli", "train", str(recipe_file), "--out", str(out)]
    command += ["--set", "train.epochs=100000", "--set", "log.every=1"]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENV,
        # a background job of a shell is started deaf to SIGINT, and its children are too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        metrics = out / "metrics.jsonl"
        until(lambda: metrics.is_file() and metrics.stat().st_size > 0)
        second = sift("train", recipe_file, "--out", out, "--resume")
        run.send_signal(number)
        printed, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert printed == ""
    assert "interrupted after step " in said
    assert said.splitlines()[-1] == f"Go on with: sift {shlex.join(command[3:])} --resume"
    assert second.returncode == 2
    assert f"process {run.pid} trains into it" in second.stderr
    left = {path.name for path in out.iterdir()} - {"predictions.jsonl"}  # of an evaluation, if any
    assert left == {"checkpoint", "gradient.jsonl", "metrics.jsonl", "recipe.yaml"}


@pytest.mark.parametrize("amid", ["loop.open_session", "choosing.select"])
def test_an_interruption_before_the_first_step_leaves_nothing(
    amid: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def interrupted(*args: object, **more: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(f"sift_cli.training.{amid}", interrupted)
    done = sift("train", recipe_file, "--out", tmp_path / "run")
    assert done.returncode == 130
    said = done.stderr.splitlines()[-1]
    assert said == "interrupted; nothing is saved yet, and the same command begins anew"
    assert not (tmp_path / "run").exists()


def test_resume_and_overwrite_exclude_each_other(recipe_file: Path) -> None:
    done = sift("train", recipe_file, "--resume", "--overwrite")
    assert done.returncode == 2
    assert "give one of them" in done.stderr
