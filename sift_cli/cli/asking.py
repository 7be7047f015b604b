"""The command that asks a model about texts."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from sift_cli.cli.checks import check_tuned
from sift_cli.cli.options import (
    BaseModelPath,
    Device,
    Json,
    Longest,
    Tuned,
    print_json,
    print_table,
)
from sift_cli.errors import SiftError
from sift_cli.system.terminal import visible
from sift_cli.tasks.table import LONGEST_ANSWER

if TYPE_CHECKING:
    from sift_cli.models.loading import LoadedModel
    from sift_cli.recipe import Recipe
    from sift_cli.tasks.generation import Answer
    from sift_cli.tasks.language import Language
    from sift_cli.tasks.prompts import Prompt


def predict(
    tuned: Tuned,
    text: Annotated[
        list[str] | None, typer.Argument(help="Texts, each classified, or answered.")
    ] = None,
    pair: Annotated[
        list[str] | None, typer.Option(help="The second text of each, for sentence pairs.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input", help="A file of prompts: .jsonl, .json, .csv, .parquet, or .txt by line."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="A new file for the answers: a JSON object a line.")
    ] = None,
    longest: Longest = LONGEST_ANSWER,
    base: BaseModelPath = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Try a tuned model: classify texts, or let a language model answer them.

    Example: sift predict runs/rte "A man sleeps." --pair "A man is awake."
    """
    texts = text or []
    if bool(texts) == (source is not None):
        raise SiftError("give texts to predict, or a file of them with --input; one of the two")
    if pair and len(pair) != len(texts):
        raise SiftError(f"{len(texts)} texts, but {len(pair)} --pair; give one for each")
    require_new_lines(output)
    check_tuned(tuned, device)
    from sift_cli.models.devices import pick_device
    from sift_cli.runs.tuned import load_tuned, require_texts, task_of_loaded
    from sift_cli.tasks.classification import Classification
    from sift_cli.tasks.language import Language
    from sift_cli.tasks.tagging import Tagging

    loaded, recipe = load_tuned(tuned, base)
    task, where = task_of_loaded(loaded, recipe), pick_device(device)
    if isinstance(task, Language):
        if pair:
            raise SiftError("--pair: a language model takes one text at a time")
        prompts = _prompts(task, loaded, recipe, texts, source)
        answers = task.answers(loaded, prompts, device=where, longest=longest)
        found: Iterator[dict[str, Any]] = (_line(*one, source) for one in answers)
    elif source is not None or output is not None:
        raise SiftError(f"--input, --output: {tuned} classifies; give its texts as arguments")
    else:
        if recipe is not None:
            require_texts(tuned, recipe, 2 if pair else 1)
        assert isinstance(task, Classification | Tagging)
        limit = recipe.data.max_length if recipe else None
        found = iter(task.predict(loaded, texts, pair, device=where, max_length=limit))
    if output is not None:
        _write(output, found)
    elif as_json:
        print_json({"predictions": list(found)})
    else:
        _print(list(found))


def require_new_lines(output: Path | None) -> None:
    """Raises SiftError where a file for answers is there already, or is none of JSON lines."""
    if output is not None and (output.suffix != ".jsonl" or output.exists()):
        why = "exists already" if output.exists() else "its name must end in .jsonl"
        raise SiftError(f"--output {output}: {why}; choose another")


def _prompts(
    task: "Language",
    loaded: "LoadedModel",
    recipe: "Recipe | None",
    texts: list[str],
    source: Path | None,
) -> "list[Prompt]":
    """The prompts of the arguments, or of the file, whose rows are laid out as those trained on."""
    from sift_cli.tasks.prompts import prompts_of, read_prompts

    plain = task.takes_text(loaded.tokenizer)
    if source is None:
        return prompts_of(texts, plain)
    told: dict[str, Any] = {}
    if recipe is not None and recipe.data.format is not None:
        told = {"format": recipe.data.format, "columns": recipe.data.columns}
    return read_prompts(source, task.name, plain=plain, **told)


def _line(prompt: "Prompt", answer: "Answer", source: Path | None) -> dict[str, Any]:
    """What is told of an answer; of a row of a file its number as well, and what was expected."""
    if source is None:
        return {"text": prompt.shown(), **answer.to_json()}
    line = {"row": prompt.number, "prompt": prompt.shown(), **answer.to_json()}
    return line if prompt.expected is None else {**line, "expected": prompt.expected}


def _write(output: Path, lines: Iterator[dict[str, Any]]) -> None:
    """Writes a line for each, as they come: what is there stays if the rest fails."""
    first = next(lines)  # no file is begun where the prompts are no good
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("x", encoding="utf-8") as file:
        for line in chain([first], lines):
            print(json.dumps(line, ensure_ascii=False), file=file, flush=True)


def _listed(items: list[Any]) -> str:
    """Labels, tags or entities in a line."""
    texts = [one if isinstance(one, str) else f"{one['words']} ({one['kind']})" for one in items]
    return ", ".join(texts) or "none"


def _print(predictions: list[dict[str, Any]]) -> None:
    """A table of what was asked and what came out."""
    known = ("label", "labels", "entities", "tags", "probability", "score", "answer", "expected")
    keys = [key for key in known if any(key in one for one in predictions)]
    table = Table("text", *keys)
    for one in predictions:
        asked = one.get("text", one.get("prompt"))
        asked = asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False)
        texts = " / ".join([asked, one["pair"]] if "pair" in one else [asked])
        found = (one.get(key, "") for key in keys)
        cells = [_listed(cell) if isinstance(cell, list) else cell for cell in found]
        shown = (visible(cell) if isinstance(cell, str) else f"{cell:.4f}" for cell in cells)
        table.add_row(escape(texts), *map(escape, shown))
    print_table(table)
