"""Cards: the README.md of a run folder and of a merged model, as the model hub reads them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from sift_cli.delta.header import Header
from sift_cli.recipe import Recipe
from sift_cli.runs.folder import DELTA_FILE, REPORT_FILE
from sift_cli.runs.summary import Summary
from sift_cli.tasks.kinds import task_of
from sift_cli.tasks.metrics import Metrics, shown
from sift_cli.tasks.table import LANGUAGE, TASKS, language_facts, text_columns
from sift_cli.tasks.task import Published

GLUE = ("glue", "glue_data", *TASKS)  # what folders of its rows are called
PAPER = "[SIFT, Song et al., ICML 2024](https://arxiv.org/abs/2312.11875)"
BACK = """
`sift merge DELTA --base THIS_FOLDER --undo --out base`, with the delta that made it, gives the
base back, bit for bit.
"""


def delta_card(recipe: Recipe, summary: Summary) -> str:
    """The card of a run folder, from its recipe and summary."""
    settings = recipe.model_dump(mode="json")
    metrics, columns = summary.metrics, summary.scores
    heading = [f"metric ({settings['eval']['split']})", *columns]
    rows = [[key, *(shown(found[key]) for found in columns.values())] for key in metrics]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [heading, ["---"] * len(heading), *rows])
    trained, total = summary.trained_entries, summary.total_entries
    task = task_of(summary)
    return f"""{_front(settings, metrics, "adapter", task.published)}
# {_title(settings)}

A sparse delta: {trained:,} entries of the {total:,} of `{_base(settings)}` trained
({trained / total:.2%}; policy `{summary.policy}`, {PAPER}){_whole(summary)}.
`{DELTA_FILE}` ({summary.delta_bytes:,} bytes) turns the base into the trained model bit for
bit, and back.

{table}

{summary.steps:,} steps of {summary.step_time_ms:.0f} ms (median); the weights are those of
step {summary.kept_step:,}. `{REPORT_FILE}` shows the run.
{_tokens(summary.language)}
## How to use

```sh
{_commands(settings)}
```

{_ending(settings, task.published)}"""


def model_card(header: Header) -> str:
    """The card of a merged model, from the header of its delta, which must hold a recipe."""
    assert header.recipe is not None
    settings, metrics = header.recipe, header.metrics
    rows = "\n".join(f"| {name} | {shown(value)} |" for name, value in metrics.items())
    task = task_of(header)
    versions = ", ".join(f"{name} {value}" for name, value in header.versions.items())
    return f"""{_front(settings, metrics, "finetune", task.published)}
# {_title(settings)}

`{_base(settings)}`, fine-tuned by changing few of its entries (policy `{header.policy}`,
{PAPER}). All others are the base's, bit for bit.

| metric ({settings["eval"]["split"]}) | value |
| --- | --- |
{rows}
{_tokens(header.language)}
## How to use

{task.usage(_paired(settings))}
{BACK if header.language else ""}
{_ending(settings, task.published)}
Versions: {versions}.
"""


def _whole(summary: Summary) -> str:
    """The entries beside the budget; nothing where a language model has none."""
    if summary.language and not summary.dense_entries:
        return ""
    return f", and\n{summary.dense_entries:,} in modules that train whole"


def _tokens(language: Mapping[str, Any] | None) -> str:
    """How rows of a language task became tokens, as a paragraph with its own blank line."""
    if language is None:
        return ""
    facts = language_facts(language)
    facts = {key: f"`{said}`" if key == "stops at" else said for key, said in facts.items()}
    return "\n" + "".join(f"- {key}: {said}\n" for key, said in facts.items())


def _commands(settings: Mapping[str, Any]) -> str:
    """What to type beside the delta."""
    lines = {
        f"sift merge {DELTA_FILE} --out merged": "an ordinary Hugging Face folder",
        f"sift predict {DELTA_FILE} {_shell_example(settings)}": "",
        "sift eval .": "the metrics again",
    }
    task = settings["data"]["task"]
    if task in LANGUAGE:
        lines[f"sift merge {DELTA_FILE} --base merged --undo --out base"] = "and back"
    if task == "instruct":
        lines = {f"sift chat {DELTA_FILE}": "ask it", **lines}
    wide = max(44, *(len(line) for line, why in lines.items() if why))
    return "\n".join(f"{line:<{wide}} # {why}" if why else line for line, why in lines.items())


def _front(settings: Mapping[str, Any], metrics: Metrics, relation: str, said: Published) -> str:
    """The YAML block that the hub reads."""
    data, model = settings["data"], settings["model"]
    hub_data = _hub_id(data["path"])
    hub_base = _hub_id(model["path"])
    more: dict[str, Any] = {"base_model_relation": relation} if hub_base else {}
    results = [
        EvalResult(
            task_type=said.pipeline_tag,
            dataset_type=hub_data or "other",
            dataset_name=dataset_name(data),
            dataset_split=settings["eval"]["split"],
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in metrics.items()
        if value is not None
    ]
    card = ModelCardData(
        base_model=hub_base,
        datasets=[hub_data] if hub_data else None,
        eval_results=results or None,
        library_name="transformers" if relation == "finetune" else None,
        license=model["license"],
        metrics=list(metrics),
        model_name=_title(settings),
        pipeline_tag=said.pipeline_tag,
        tags=["sift", "sparse-fine-tuning"],
        **more,
    )
    return f"---\n{card.to_yaml()}\n---\n"


def _ending(settings: Mapping[str, Any], said: Published) -> str:
    """What it predicts, licence and recipe: the same on both cards."""
    recipe = yaml.safe_dump(without_places(settings), sort_keys=False, allow_unicode=True).rstrip()
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", recipe))])
    license = settings["model"]["license"]
    told = "not stated" if license == "unknown" else license
    return f"""It predicts {said.predicts}.

Licence: {told}; that of the base, `{_base(settings)}`, holds too.

## The recipe, every value resolved

{fence}yaml
{recipe}
{fence}
"""


def _title(settings: Mapping[str, Any]) -> str:
    return f"{dataset_name(settings['data'])} on {_base(settings)}"


def dataset_name(data: Mapping[str, Any]) -> str:
    """What the rows of a recipe's `data` are called: by their task where they are GLUE's."""
    name = _name(data["path"])
    glue = data["task"] in TASKS and Path(name).name.lower().replace("-", "") in GLUE
    return str(data["task"]) if glue else name


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values with the last part of local paths alone: the rest tells of a machine."""
    model, data = settings["model"], settings["data"]
    return {
        **settings,
        "model": {**model, "path": _base(settings)},
        "data": {**data, "path": _hub_id(data["path"]) or _name(data["path"])},
        "out": None,
    }


def _base(settings: Mapping[str, Any]) -> str:
    path: str = settings["model"]["path"]
    return path if _hub_id(path) else _name(path)


def _name(path: str) -> str:
    """The last part of a local path: the rest means nothing elsewhere."""
    return path if path.startswith(("pkg:", "builtin:")) else Path(path).name or path


def _hub_id(path: str) -> str | None:
    """The path, where it is the id of something on the hub."""
    fits = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path)
    return path if fits and not Path(path).expanduser().exists() else None


def _paired(settings: Mapping[str, Any]) -> bool:
    data = settings["data"]
    return len(text_columns(data["task"], data["text"])) > 1


def _shell_example(settings: Mapping[str, Any]) -> str:
    if settings["data"]["task"] == "instruct":
        return '"A question."'
    return '"First text." --pair "Second text."' if _paired(settings) else '"A text."'
