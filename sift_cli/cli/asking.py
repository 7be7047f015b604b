"""The command that asks a model about texts."""

import json
import os
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
    stderr,
)
from sift_cli.errors import SiftError
from sift_cli.runs.written import STANDARD
from sift_cli.system.terminal import visible
from sift_cli.tasks.table import LONGEST_ANSWER

if TYPE_CHECKING:
    from sift_cli.runs.predictor import Predictor


Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="FILE",
        help="Rows with the columns of the recipe: .csv, .tsv, .jsonl, .parquet, or - for JSON "
        "lines on stdin; for language models .json, and .txt by line, too.",
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="A new file for the rows and what is said of each, of the same endings (language "
        "models: .jsonl); - is JSON lines on stdout.",
    ),
]


def predict(
    tuned: Tuned,
    text: Annotated[
        list[str] | None, typer.Argument(help="Texts, each classified, or answered.")
    ] = None,
    pair: Annotated[
        list[str] | None, typer.Option(help="The second text of each, for sentence pairs.")
    ] = None,
    source: Input = None,
    output: Output = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an --output that was broken off.")
    ] = False,
    longest: Longest = LONGEST_ANSWER,
    base: BaseModelPath = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Try a tuned model on texts, or on every row of a file: it classifies, or it answers.

    Example: sift predict runs/rte "A man sleeps." --pair "A man is awake."
    """
    texts = text or []
    _require_asked(texts, pair, source, output, resume)
    check_tuned(tuned, device)
    from sift_cli.models.devices import pick_device
    from sift_cli.runs.bulk import predict_file
    from sift_cli.runs.predictor import Predictor
    from sift_cli.runs.tuned import load_tuned, require_texts

    loaded, recipe = load_tuned(tuned, base)
    predictor = Predictor(loaded, recipe, pick_device(device))
    if source is not None and (output or source == STANDARD or not predictor.speaks):
        to = output or STANDARD
        predict_file(predictor, source, to, resume=resume, longest=longest, console=stderr)
        return
    if recipe is not None and not predictor.speaks:
        require_texts(tuned, recipe, 2 if pair else 1)
    found = _asked(predictor, texts, pair, source, longest)
    if as_json:
        print_json({"predictions": found})
    else:
        _print(found)


def _asked(
    predictor: "Predictor",
    texts: list[str],
    pair: list[str] | None,
    source: str | None,
    longest: int,
) -> list[dict[str, Any]]:
    """What is said of each text, or of each prompt in a file."""
    from sift_cli.runs.bulk import tell_cut
    from sift_cli.runs.predictor import told_of_prompt

    if source is not None:
        prompts = predictor.prompts(Path(source))
        return [told_of_prompt(*one) for one in predictor.answers(prompts, longest)]
    if predictor.speaks:
        if pair:
            raise SiftError("--pair: a language model takes one text at a time")
        return predictor.speak(texts, longest)
    asked = predictor.ask(texts, pair)
    tell_cut(asked.cut, len(texts), asked.longest, stderr)
    return asked.answers


def _require_asked(
    texts: list[str],
    pair: list[str] | None,
    source: str | None,
    output: str | None,
    resume: bool,
) -> None:
    """Raises SiftError where arguments do not fit together, or name files that are no good."""
    from sift_cli.runs.bulk import require_files
    from sift_cli.tasks.streams import STREAMED

    if bool(texts) == (source is not None):
        raise SiftError("give texts to predict, or a file of them with --input; one of the two")
    for one in texts:
        if one.lower().endswith(STREAMED) and os.path.isfile(one):
            raise SiftError(f"{one} is a file, not a text; for its rows say --input {one}")
    if source is None and (output is not None or resume):
        raise SiftError("--output, --resume: they are for the rows of --input")
    if pair and source is not None:
        raise SiftError("--pair: it is for texts; pairs of --input are in its columns")
    if pair and len(pair) != len(texts):
        raise SiftError(f"{len(texts)} texts, but {len(pair)} --pair; give one for each")
    if resume and output is None:
        raise SiftError("--resume: say with which --output")
    if source is not None:
        require_files(source, output or STANDARD, resume)


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
