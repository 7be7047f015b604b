"""Cards as the hub reads them: front matter, numbers, commands."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from sift_cli.convert.merge import merge
from sift_cli.delta import load_delta
from sift_cli.recipe import load_recipe
from sift_cli.runs.cards import delta_card, model_card
from sift_cli.runs.summary import Summary
from sift_cli.training import train
from tests.support.chats import save_chat_recipe
from tests.support.command import sift


@pytest.fixture
def run(recipe_file: Path, tmp_path: Path) -> Path:
    train(load_recipe(recipe_file, ["model.license=mit"]), tmp_path / "run")
    return tmp_path / "run"


def test_both_cards_hold_recipe_metrics_base_and_licence(run: Path, tmp_path: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    merge(run / "delta.safetensors", tmp_path / "merged", verify=False)
    for folder in (run, tmp_path / "merged"):
        card = ModelCard.load(folder / "README.md")
        assert card.data.license == "mit"
        assert card.data.pipeline_tag == "text-classification"
        assert {"sift", "sparse-fine-tuning"} <= set(card.data.tags or [])
        assert card.data.base_model is None  # a local folder is no one's on the hub
        results = card.data.eval_results or []
        assert {one.metric_type: one.metric_value for one in results} == pytest.approx(
            summary["metrics"], abs=1e-4
        )
        resolved = yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])
        assert resolved["selection"]["density"] == 0.05
        assert "`negative`, `positive`" in card.text
        assert "## How to use" in card.text
        assert f"{summary['metrics']['accuracy']:.4f} |" in card.text
    assert "sift merge delta.safetensors" in (run / "README.md").read_text()
    assert 'pipeline("text-classification"' in (tmp_path / "merged/README.md").read_text()


def test_a_turned_back_model_has_no_card(run: Path, tmp_path: Path) -> None:
    merge(run / "delta.safetensors", tmp_path / "m", verify=False)
    merge(run / "delta.safetensors", tmp_path / "back", base=str(tmp_path / "m"), undo=True)
    assert not (tmp_path / "back/README.md").exists()


def test_ids_of_the_hub_are_linked_and_pairs_shown(run: Path, recipe_file: Path) -> None:
    summary = Summary.read(run)
    assert summary is not None
    hub = ["model.path=owner/base", "data.path=nyu-mll/glue", "data.task=rte"]
    recipe = load_recipe(recipe_file, hub)
    card = ModelCard(delta_card(recipe, summary))
    assert card.data.base_model == "owner/base"
    assert card.data.base_model_relation == "adapter"
    assert card.data.datasets == ["nyu-mll/glue"]
    assert card.data.license == "unknown"
    assert "Licence: not stated" in card.text
    assert "--pair" in card.text
    header = load_delta(run / "delta.safetensors").header
    header = header.model_copy(update={"recipe": recipe.model_dump(mode="json")})
    card = ModelCard(model_card(header))
    assert card.data.base_model_relation == "finetune"
    assert card.data.library_name == "transformers"
    assert "text_pair" in card.text


@pytest.mark.parametrize(
    ("path", "shown"),
    [("/home/me/bert", "bert"), ("pkg:mini/model", "pkg:mini/model"), ("me/bert", "me/bert")],
)
def test_a_base_goes_by_a_name_that_tells(
    run: Path, recipe_file: Path, path: str, shown: str
) -> None:
    summary = Summary.read(run)
    assert summary is not None
    recipe = load_recipe(recipe_file, [f"model.path={path}"])
    assert f"# data on {shown}\n" in delta_card(recipe, summary)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("builtin:reviews", "builtin:reviews"),
        ("/data/glue", "sst2"),
        ("/data/SST-2", "sst2"),
        ("nyu-mll/glue", "sst2"),
        ("/home/me/reviews.csv", "reviews.csv"),
    ],
)
def test_a_card_names_its_rows_and_no_place(
    run: Path, recipe_file: Path, path: str, name: str
) -> None:
    summary = Summary.read(run)
    assert summary is not None
    changes = [f"data.path={path}", "model.path=/home/me/bert", "out=/home/me/runs/x"]
    card = delta_card(load_recipe(recipe_file, changes), summary)
    assert f"# {name} on bert\n" in card
    assert "/home" not in card
    assert "/data" not in card


def test_a_regression_and_a_recipe_with_fences(run: Path, recipe_file: Path) -> None:
    summary = Summary.read(run)
    assert summary is not None
    ticks = "```\n# not a heading"
    recipe = load_recipe(recipe_file, [f"data.label={json.dumps(ticks)}"])
    card = delta_card(recipe, replace(summary, labels=None))
    assert "It predicts a number." in card
    assert "\n````yaml\n" in card


@pytest.mark.parametrize("task", ["instruct", "text"])
def test_cards_of_a_language_run_say_how_to_use_it_and_go_back(task: str, tmp_path: Path) -> None:
    recipe = load_recipe(save_chat_recipe(tmp_path), ["data.system=be brief"])
    if task == "text":
        for split in ("train", "validation"):
            lines = [json.dumps({"text": f"once upon a time {at}"}) + "\n" for at in range(8)]
            (tmp_path / f"chats/{split}.jsonl").write_text("".join(lines))
        recipe = load_recipe(tmp_path / "chat.yaml", ["data.task=text"])
    run, merged = tmp_path / "run", tmp_path / "merged"
    summary = train(recipe, run)
    merge(run / "delta.safetensors", merged, verify=False)
    for folder in (run, merged):
        card = ModelCard.load(folder / "README.md")
        assert card.data.pipeline_tag == "text-generation"
        results = card.data.eval_results or []
        found = {one.metric_type: one.metric_value for one in results}
        assert found == {key: round(value or 0, 4) for key, value in summary.metrics.items()}
        assert {one.dataset_name for one in results} == {"chats"}
        assert card.text.lstrip().startswith("# chats on base\n")
        prose = card.text.partition("## The recipe")[0]
        assert f"| perplexity | {summary.metrics_before['perplexity']:.4f} |" in prose or (
            folder == merged
        )
        assert "- stops at: `<|im_end|>`\n" in prose
        assert ("- template: the model's own\n" in prose) == (task == "instruct")
        assert ("- system: be brief\n" in prose) == (task == "instruct")
        assert "--undo --out base" in prose
        assert not re.search(r"label|class|modules that train whole", prose)
    card = (run / "README.md").read_text()
    assert ("sift chat delta.safetensors" in card) == (task == "instruct")
    asked = '[{"role": "user"' if task == "instruct" else 'answer("A text begins")'
    assert asked in (merged / "README.md").read_text()
    header = load_delta(run / "delta.safetensors").header
    assert header.language is not None
    assert list(header.language["stops"]) == ["<|im_end|>"]
    again = tmp_path / "back"
    merge(run / "delta.safetensors", again, base=str(merged), undo=True)
    weights = "model.safetensors"
    assert load_file(again / weights).keys() == load_file(tmp_path / "base" / weights).keys()
    for name, value in load_file(tmp_path / "base" / weights).items():
        assert torch.equal(value, load_file(again / weights)[name])
    found = inspected(run)
    assert "stops at:   <|im_end|>" in found
    assert "labels" not in found


def inspected(run: Path) -> str:
    """What `sift inspect` prints of a run."""
    done = sift("inspect", run)
    assert done.returncode == 0, done.stderr
    return done.stdout
