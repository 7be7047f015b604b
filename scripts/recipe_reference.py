"""Writes docs/recipe.md, the reference of every recipe key, from the schema."""

from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sift_cli.recipe import OPTIONS, ROW_OPTIONS, Recipe
from sift_cli.selection.policies import POLICIES
from sift_cli.tasks.conversations import FORMATS
from sift_cli.tasks.table import TASKS

PAGE = Path(__file__).parent.parent / "docs/recipe.md"
INTRO = """# The recipe

Every key, read from the schema; `scripts/recipe_reference.py` writes this page. `model.path`,
`data.path` and `data.task` are enough to begin with. Unknown keys are errors. `sift train --set
section.key=value` wins over the file, and the resolved recipe is saved in the run folder.

Paths that are relative start at the folder in which the command runs, not at the recipe's. A
`data.path` that is not there is looked for on the hub only where it reads like a dataset's id
(`NAME` or `OWNER/NAME`), not like a file (`tickets.csv`) or a path (`./tickets`).
"""


def main() -> None:
    """Writes the page."""
    PAGE.write_text(reference(), encoding="utf-8")


def reference() -> str:
    """The page."""
    parts = [INTRO]
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            parts.append(f"\n## {name}\n\n{section.__doc__}\n\n| key | takes | default | |\n")
            parts.append("| --- | --- | --- | --- |\n")
            parts += _rows(section)
        else:
            parts.append(f"\n## {name}\n\n{field.description}\n")
    parts.append(
        "\nSome keys of `selection` belong to one kind of it and are errors elsewhere:\n\n"
    )
    parts.append("| key | belongs to | default there |\n| --- | --- | --- |\n")
    for key, option in OPTIONS.items():
        default = "" if option.default is None else f"`{option.default}`"
        parts.append(f"| {key} | `{option.needs}` | {default} |\n")
    parts.append(
        "\nSo do some of `data`:\n\n| key | belongs to | default there |\n| --- | --- | --- |\n"
    )
    for key, defaults in ROW_OPTIONS.items():
        tasks = " or ".join(defaults)
        said = ", ".join(dict.fromkeys(f"`{one}`" for one in defaults.values() if one is not None))
        parts.append(f"| {key} | `task: {tasks}` | {said} |\n")
    parts.append("\n## Policies\n\nA policy fills what `selection` leaves open.\n\n")
    parts.append("| policy | score | scope | structure | schedule | and | source |\n")
    parts.append("| --- | --- | --- | --- | --- | --- | --- |\n")
    for name, row in POLICIES.items():
        axes = f"{row.score} | {row.scope} | {row.structure} | {row.schedule}"
        more = ", ".join(f"`{key}: {value}`" for key, value in row.more.items())
        parts.append(f"| {name} | {axes} | {more} | {row.paper} |\n")
    parts.append("\n## Tasks\n\n| task | text | labels | metrics |\n| --- | --- | --- | --- |\n")
    for name, task in TASKS.items():
        labels = ", ".join(task.labels) if task.labels else "a number"
        metrics = ", ".join(task.metrics)
        parts.append(f"| {name} | {', '.join(task.text)} | {labels} | {metrics} |\n")
    parts.append("| custom | `data.text` | `data.label` | `data.metrics` |\n")
    parts.append("| tags | `data.text`, words | `data.label`, tags | entity_f1 |\n")
    parts.append(
        "\n## Formats\n\nThose of `task: text` and, the others, of `task: instruct`; a word"
    )
    parts.append(" of `data.columns` says what one of these names is called in your rows.\n\n")
    parts.append("| format | columns | and, if there are any | in each message |\n")
    parts.append("| --- | --- | --- | --- |\n")
    for name, form in FORMATS.items():
        names = (", ".join(some) for some in (form.needs, form.may, form.keys))
        parts.append(f"| {name} | {' | '.join(names)} |\n")
    return "".join(parts)


def _rows(section: type[BaseModel], before: str = "") -> list[str]:
    """A line for each key, those of sections inside it among them."""
    rows = []
    for key, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            rows += _rows(kind, f"{before}{key}.")
        else:
            rows.append(_row(before + key, field))
    return rows


def _row(key: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    said = "" if default is None else f"`{default}`"
    if default is PydanticUndefined:
        said = "required"
    return f"| {key} | {_takes(field.annotation)} | {said} | {field.description or ''} |\n"


def _takes(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return ", ".join(str(one) for one in get_args(kind))
    if origin in (Union, UnionType):
        return " or ".join(_takes(one) for one in get_args(kind) if one is not type(None))
    if origin is list:
        return "list"
    if origin is dict:
        return "names" if get_args(kind)[1] is str else "numbers by name"
    if hasattr(kind, "__metadata__"):
        return _takes(get_args(kind)[0])
    return {"str": "text", "int": "integer", "float": "number", "bool": "true, false"}[
        kind.__name__
    ]


if __name__ == "__main__":
    main()
