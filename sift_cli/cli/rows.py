"""Commands about rows of data."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sift_cli.cli.checks import check_recipe
from sift_cli.cli.options import Json, Overrides, RecipeArg, print_json, print_table, stdout
from sift_cli.system import shipped
from sift_cli.system.terminal import visible

if TYPE_CHECKING:
    from sift_cli.analysis.rows import ShownRow

LEARNT = "bold green"


def show(
    recipe: RecipeArg,
    row: Annotated[
        int | None,
        typer.Option(help="Its number in the source split, from 0; else the first one there."),
    ] = None,
    split: Annotated[str, typer.Option(help="The split.")] = "train",
    tokens: Annotated[
        bool, typer.Option("--tokens", help="A line for each token, with its id.")
    ] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show a row as the model sees it: tokens, those that are learnt, and counts of its split.

    Example: sift data show glue/rte --row 3
    """
    from sift_cli.recipe import load_recipe

    resolved = load_recipe(shipped.find(recipe), overrides or [])
    check_recipe(resolved)
    from sift_cli.analysis.rows import show_row

    shown = show_row(resolved, row, split)
    if as_json:
        print_json(shown.to_json())
        return
    stdout.print(_title(shown), highlight=False, markup=False)
    if tokens:
        _show_tokens(shown)
    else:
        _show_text(shown)
    sentences = shown.counts.sentences()
    if shown.counts.refused:
        sentences.append(f"Training would stop: {visible(shown.counts.refused)}")
    for sentence in sentences:
        stdout.print(sentence, highlight=False, markup=False)


def _title(shown: "ShownRow") -> str:
    parts = [f"{shown.split} row {shown.number} ({shown.layout})", f"{shown.length:,} tokens"]
    if shown.label is None:
        share = shown.learnt / max(len(shown.tokens), 1)
        marked = "in green" if stdout.is_terminal and not stdout.no_color else "in [[ ]]"
        parts.append(f"{shown.learnt:,} learnt ({share:.1%}), {marked}")
    else:
        parts.append(f"label {visible(shown.label)}")
    if shown.fate != "kept":
        parts.append(shown.fate)
    return ", ".join(parts)


def _show_text(shown: "ShownRow") -> None:
    """The tokens as running text; line ends are seen and made."""
    coloured = stdout.is_terminal and not stdout.no_color
    text = Text()
    for part in shown.parts:
        said = visible(part.text, kept="\n").replace("\n", "\\n\n")
        said = f"[[{said}]]" if part.learnt and not coloured else said
        text.append(said, LEARNT if part.learnt else None)
    stdout.print(text)


def _show_tokens(shown: "ShownRow") -> None:
    table = Table("at", "id", "token", "learnt")
    for at, token in enumerate(shown.tokens):
        said = escape(visible(token.text, kept=""))
        style = LEARNT if token.learnt else None
        table.add_row(f"{at}", f"{token.id}", said, "yes" if token.learnt else "", style=style)
    print_table(table)
