"""`sift eval --tasks`: lm-eval on a model in memory, against merged folders and its own command."""

import json
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sift_cli.analysis import benchmarks
from sift_cli.analysis.benchmarks import SEEDS, Asked, beside, metrics_of, run_benchmarks, store
from sift_cli.convert.merge import merge
from sift_cli.recipe import load_recipe
from sift_cli.training import train
from tests.support.chats import CHATML, byte_tokenizer, save_chat_model
from tests.support.command import ENV, Done, sift
from tests.support.models import tiny_model, tiny_tokenizer

with_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e '.[eval]'"
)
COLOURS = ["red", "green", "blue"]
CHOICE = """\
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_target: right
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: brier_score}}]
metadata: {{version: 2.0}}
"""
FREE = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[right]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}, {{metric: bleu}}]
metadata: {{version: 1.0}}
"""


def save_model(folder: Path, template: str = CHATML, **more: Any) -> Path:
    """A tiny random Llama of bytes, whose logits are far from flat."""
    torch.manual_seed(0)
    save_chat_model(folder, template, **more)
    config = AutoConfig.from_pretrained(folder)
    config.initializer_range = 0.3
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task to choose in and one to answer, over rows of its own."""
    if find_spec("lm_eval") is not None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"of what colour is {at}?", "choices": COLOURS, "right": at % 3}
        for at in range(7)
    ]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("colours", CHOICE), ("sums", FREE)):
        (folder / f"{name}.yaml").write_text(text.format(data=folder / "rows.json"))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that learnt from conversations."""
    base, data = save_model(tmp_path / "base"), tmp_path / "chats"
    data.mkdir()
    for split in ("train", "validation"):
        lines = [
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": f"of what colour is {at}?"},
                        {"role": "assistant", "content": COLOURS[at % 2]},
                    ]
                }
            )
            for at in range(8)
        ]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    path = tmp_path / "chat.yaml"
    path.write_text(
        f"model: {{path: {base}}}\n"
        f"data: {{path: {data}, task: instruct, max_length: 128}}\n"
        "selection: {density: 0.2, batches: 2}\n"
        "train: {max_steps: 4, batch_size: 4, learning_rate: 1.0e-2, seed: 3}\n"
        "log: {report: false}\n"
    )
    train(load_recipe(path), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids that the model gets, row by row."""
    from lm_eval.models.huggingface import HFLM

    seen: list[list[int]] = []

    def spied(name: str, key: str) -> None:
        whole = getattr(HFLM, name)

        def spy(self: Any, *args: Any, **more: Any) -> Any:
            ids = args[0] if args else more[key]
            seen.extend(ids.tolist())
            return whole(self, *args, **more)

        monkeypatch.setattr(HFLM, name, spy)

    spied("_model_call", "inps")
    spied("_model_generate", "context")
    return seen


def scored(source: Path, tasks: Path, *more: object) -> dict[str, Any]:
    """What `sift eval --json` says of both tasks; nothing else is on stdout."""
    done = sift(
        *("eval", source, "--tasks", "colours,sums", "--tasks-path", tasks, "--json", *more)
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refused(*args: object) -> str:
    """The one line that `sift eval ARGS` ends with."""
    done: Done = sift("eval", *args, "--quiet")
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@with_lm_eval
def test_a_delta_in_memory_scores_as_its_merged_folder(
    run: Path, tasks: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    merge([run / "delta.safetensors"], merged)
    direct = scored(run, tasks)
    assert direct["tasks"] == scored(merged, tasks)["tasks"]
    assert direct["tasks"] == scored(run / "delta.safetensors", tasks)["tasks"]
    plain = scored(tmp_path / "base", tasks, "--template")
    assert direct["settings"] == plain["settings"]
    brier = [one["tasks"]["colours"]["metrics"]["brier_score"] for one in (direct, plain)]
    assert brier[0]["value"] != brier[1]["value"]


@with_lm_eval
@pytest.mark.parametrize("chats", [False, True])
def test_a_base_scores_as_through_lm_evals_own_command(
    chats: bool, tasks: Path, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "colours,sums"]
    command += ["--model_args", f"pretrained={base}", "--include_path", str(tasks)]
    command += ["--device", "cpu", "--output_path", str(tmp_path / "theirs.json")]
    command += ["--num_fewshot", "2"]
    env = ENV | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        command + ["--apply_chat_template"] * chats,
        capture_output=True,
        text=True,
        env=env,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("theirs*.json")
    theirs = json.loads(file.read_text())
    more = ["--template"] if chats else []
    ours = scored(base, tasks, "--num-fewshot", 2, "--device", "cpu", *more)["tasks"]
    for name, task in ours.items():
        assert task["metrics"] == metrics_of(theirs["results"][name])
        assert task["shots"] == theirs["n-shot"][name] == 2
        assert task["version"] == theirs["versions"][name]
    assert ours["colours"]["metrics"]["brier_score"]["value"] > 0


@with_lm_eval
@pytest.mark.parametrize("bos", ["<|begin|>", "<|endoftext|>"])
def test_a_template_doubles_no_bos(
    bos: str, tasks: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    """lm-eval tokenises what a template rendered, and the tokenizer would begin it once more."""
    template = "{{ '<|begin|>' }}" + CHATML
    base = save_model(tmp_path / "base", template, begins=True, bos_token=bos)
    tokenizer = byte_tokenizer(template, begins=True, bos_token=bos)
    begin = tokenizer.convert_tokens_to_ids("<|begin|>")
    assert tokenizer("a")["input_ids"][0] == begin
    scored(base, tasks, "--template", "--limit", 2)
    assert len(prompts) == 2 * 3 + 2
    assert all(ids[0] == begin and ids.count(begin) == 1 for ids in prompts)
    asked = [{"role": "user", "content": "of what colour is 1?"}]
    once = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
    assert once["input_ids"] in prompts


@with_lm_eval
def test_a_plain_prompt_begins_as_the_tokenizer_begins_it(
    tasks: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    base = save_model(tmp_path / "base", begins=True)
    scored(base, tasks, "--limit", 2)
    asked = byte_tokenizer(begins=True)("of what colour is 1?")["input_ids"]
    assert asked in prompts


@with_lm_eval
def test_prompts_are_chats_where_the_model_was_trained_on_chats(
    run: Path, tasks: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    tokenizer = byte_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")

    def chats(source: Path, *more: str) -> bool:
        prompts.clear()
        said = scored(source, tasks, "--limit", 1, *more)["settings"]["template"]
        assert all((start in ids) == said for ids in prompts)
        return bool(said)

    assert chats(run)
    assert not chats(run, "--no-template")
    assert not chats(tmp_path / "base")
    assert chats(tmp_path / "base", "--template")


@with_lm_eval
def test_shots_and_limits_and_the_system_turn_reach_the_prompts(
    run: Path, tasks: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    recipe = load_recipe(run / "recipe.yaml", ["data.system=Be brief."])
    train(recipe, tmp_path / "briefed")
    done = scored(tmp_path / "briefed", tasks, "--num-fewshot", 2, "--limit", 1)
    assert done["settings"]["system"] == "Be brief."
    tokenizer = byte_tokenizer()
    texts = [tokenizer.decode(ids) for ids in prompts]
    assert len(texts) == 3 + 1
    for text in texts:
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
        assert text.count("<|im_start|>user") == 3
    colours = done["tasks"]["colours"]
    assert {key: colours[key] for key in ("version", "shots", "rows", "of")} == {
        "version": 2.0,
        "shots": 2,
        "rows": 1,
        "of": 7,
    }


@with_lm_eval
def test_results_are_stored_with_what_they_depend_on(
    run: Path, tasks: Path, tmp_path: Path
) -> None:
    folder = run / "evaluations"
    whole = scored(run, tasks)
    (file,) = folder.iterdir()
    assert json.loads(file.read_text()) == whole
    summary = json.loads((run / "summary.json").read_text())
    assert whole["model"]["delta_sha256"] == summary["delta_sha256"]
    assert {"sift", "torch", "transformers", "lm_eval"} == set(whole["versions"])
    assert whole["is_benchmark"]
    scored(run / "delta.safetensors", tasks)
    assert list(folder.iterdir()) == [file]  # the same again
    shown = sift("eval", run, "--tasks", "colours", "--tasks-path", tasks, "--limit", 3)
    assert "3 rows of each task at most: no benchmark" in shown.stdout
    assert "colours\tacc\t" in shown.stdout
    (limited,) = set(folder.iterdir()) - {file}
    assert f"Results: {limited}\n" in shown.stdout
    assert not json.loads(limited.read_text())["is_benchmark"]
    scored(run, tasks, "--no-template", "--out", tmp_path / "plain.json")
    assert len(list(folder.iterdir())) == 2
    assert not json.loads((tmp_path / "plain.json").read_text())["settings"]["template"]


@with_lm_eval
def test_quiet_and_progress(tasks: Path, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    args = ("eval", base, "--tasks", "sums", "--tasks-path", tasks, "--limit", 1)
    loud, quiet = sift(*args), sift(*args, "--quiet")
    assert "Running generate_until requests: 100%" in loud.stderr
    assert quiet.stderr == ""
    title, heads, *rows = quiet.stdout.splitlines()
    assert title.endswith("chat template off")
    assert heads.split("\t") == ["task", "metric", "value", "stderr", "shots", "rows"]
    assert [row.split("\t")[:2] for row in rows[:2]] == [["sums", "exact_match"], ["sums", "bleu"]]
    assert loud.stdout.startswith(quiet.stdout)


@with_lm_eval
def test_the_model_is_held_once(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    base = save_model(tmp_path / "base")
    loaded, used = [], []
    load, call = benchmarks.load_tuned, HFLM._model_call

    def loads(*args: Any) -> Any:
        loaded.append(load(*args))
        return loaded[-1]

    def calls(self: Any, *args: Any, **more: Any) -> Any:
        used.append(self.model)
        return call(self, *args, **more)

    monkeypatch.setattr(benchmarks, "load_tuned", loads)
    monkeypatch.setattr(HFLM, "_model_call", calls)
    run_benchmarks(str(base), Asked(("colours",), tasks), silent=True)
    assert len(loaded) == 1
    assert used
    assert all(model is loaded[0][0].model for model in used)


@with_lm_eval
def test_tasks_that_cannot_run_are_one_line(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    # its own 14,000 take seconds to read
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    base = save_model(tmp_path / "base")
    said = refused(base, "--tasks", "colors", "--tasks-path", tasks)
    assert said == "--tasks: unknown: 'colors'; did you mean colours?"
    said = refused(base, "--tasks", "xyzzy", "--tasks-path", tasks)
    assert said.endswith("`lm-eval ls tasks` lists them")
    nowhere = tmp_path / "nowhere"
    assert refused(base, "--tasks", "sums", "--tasks-path", nowhere).endswith("no such folder")
    yaml = tasks / "sums.yaml"
    yaml.write_text(yaml.read_text() + "unsafe_code: true\n")
    said = refused(base, "--tasks", "sums", "--tasks-path", tasks)
    assert said.startswith("--tasks sums: it runs code that the model writes")
    yaml.write_text(FREE.format(data=nowhere))
    said = refused(base, "--tasks", "sums", "--tasks-path", tasks)
    assert said.startswith("--tasks sums: lm-eval cannot run them: FileNotFoundError: ")
    yaml.write_text(FREE.format(data=tasks / "rows.json").replace("question", "lacking"))
    said = refused(base, "--tasks", "sums", "--tasks-path", tasks)
    assert said.startswith("--tasks sums: lm-eval cannot run them: UndefinedError: ")


@with_lm_eval
def test_other_models_are_refused(tasks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    tiny_model("bert", torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    said = refused(folder, "--tasks", "sums", "--tasks-path", tasks)
    assert said.startswith(f"--tasks: {folder} is BertForSequenceClassification")
    bare = save_model(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    said = refused(bare, "--tasks", "sums", "--tasks-path", tasks, "--template")
    assert said.startswith("the model has no chat template; --no-template")


def test_runs_stand_in_one_row_only_where_they_were_scored_alike(run: Path, tmp_path: Path) -> None:
    train(load_recipe(run / "recipe.yaml", ["train.seed=4"]), tmp_path / "other")
    runs = [run, tmp_path / "other"]

    def stored(at: int, score: float, limit: int | None = None, **more: Any) -> Path:
        summary = json.loads((runs[at] / "summary.json").read_text())
        results = {
            "model": {"delta_sha256": summary["delta_sha256"]},
            "settings": {"template": True, "limit": limit, "seeds": SEEDS} | more,
            "versions": {"lm_eval": "0.4.13"},
            "tasks": {
                "sums": {"version": 1, "shots": 0, "metrics": {"acc": {"value": score}}},
            },
        }
        return store(results, Asked(("sums",), limit=limit), runs[at])

    before = sift("compare", *runs)
    assert "benchmarks" not in before.stdout
    assert "benchmarks" not in json.loads(sift("compare", *runs, "--json").stdout)
    stored(0, 0.5)
    stored(1, 0.75)
    stored(0, 0.25, limit=20)
    found = json.loads(sift("compare", *runs, "--json").stdout)["benchmarks"]
    assert [(row["way"], row["values"]) for row in found] == [
        ("version 1, 0 shots, template on, 20 rows, no benchmark, lm-eval 0.4.13", [0.25, None]),
        ("version 1, 0 shots, template on, all rows, lm-eval 0.4.13", [0.5, 0.75]),
    ]
    shown = sift("compare", *runs).stdout
    assert "sums\tacc\t0.5000\t0.7500\tversion 1, 0 shots" in shown
    assert "sums\tacc\t0.2500\t\tversion 1, 0 shots" in shown
    stored(1, 0.125, template=False)
    values = [[None, 0.125], [0.25, None], [0.5, 0.75]]
    assert [row.values for row in beside(runs)] == values
    file = stored(0, 0.5)
    stale = json.loads(file.read_text())
    stale["model"]["delta_sha256"] = "0" * 64
    file.write_text(json.dumps(stale))
    values[2][0] = None
    assert [row.values for row in beside(runs)] == values
    file.write_text("{}")
    done = sift("compare", *runs)
    assert (done.returncode, done.stderr) == (3, f"{file}: damaged: 'model'\n")


def test_without_lm_eval_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = refused(tmp_path, "--tasks", "arc_easy")
    assert said == ("--tasks: the package lm-eval is not installed; `pip install 'sift-cli[eval]'`")


def test_options_of_tasks_go_with_tasks(tmp_path: Path) -> None:
    for more in (("--limit", 3), ("--no-template",), ("--tasks-path", tmp_path)):
        assert refused(tmp_path, *more).endswith("go with --tasks")
    assert refused(tmp_path, "--out", "x.json") == "--out stores results of --tasks"
    assert refused(tmp_path, "--tasks", ",").startswith("--tasks: name one at least")
    said = refused(tmp_path, "--tasks", "sums", "--split", "test")
    assert said == "--tasks brings its own data; leave --recipe, --split, --data and --set out"
    said = refused(tmp_path, "--tasks", "sums", "--out", tmp_path / "no/x.json")
    assert "there is no folder" in said


def test_metrics_are_read_from_lm_evals_keys() -> None:
    values = {
        "name": "gsm8k",
        "sample_len": 20,
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": 0.1,
        "acc,none": 1,
        "acc_stderr,none": "N/A",
        "perplexity,none": float("inf"),
        "perplexity_stderr,none": float("nan"),
    }
    assert metrics_of(values) == {
        "exact_match (strict-match)": {"value": 0.25, "stderr": 0.1},
        "acc": {"value": 1.0, "stderr": None},
        "perplexity": {"value": None, "stderr": None},
    }
