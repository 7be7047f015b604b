"""A recipe for an editor: its JSON schema, and a shipped one with every key in sight."""

from typing import Any

import yaml
from pydantic import BaseModel

from sift_cli.recipe import OPTIONS, ROW_OPTIONS, Recipe, parse_recipe

SCHEMA_FILE = "sift-recipe.schema.json"
COMMENT_COLUMN = 30  # letters before the comment of a key


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe (draft 2020-12)."""
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A recipe of sift"}
    return {**about, **{k: v for k, v in Recipe.model_json_schema().items() if k != "title"}}


def editable(text: str, schema: str = SCHEMA_FILE) -> str:
    """The recipe `text` with a line that names its schema, and a comment on every key.

    Keys that it leaves out stand behind a `#` with the value that they then have. It resolves to
    the same recipe. `text` is laid out as the shipped recipes are: sections at the margin, one key
    a line below them.
    """
    resolved = parse_recipe(text, "the recipe").model_dump(mode="json")
    head, given = _sections(text)
    out = [f"# yaml-language-server: $schema={schema}", *head]
    out.append("# What stands behind a # is what holds when it is left out.")
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            line = f"{name}: {_flow(resolved[name])}"
            out += ["", _with_comment(f"# {line}", field.description)]
            continue
        out += ["", f"{name}:  # {section.__doc__}" if name in given else f"# {name}:"]
        own = {line.split(":")[0].strip(): line for line in given.get(name, [])}
        for key, one in section.model_fields.items():
            if key in own:
                bare = "#" not in own[key]
                out.append(_with_comment(own[key], one.description) if bare else own[key])
            elif _applies(name, key, resolved):
                line = f"  # {key}: {_flow(resolved[name][key])}"
                out.append(_with_comment(line, one.description))
    return "\n".join(out) + "\n"


def _sections(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """The comment at the top, and the lines of each section."""
    head: list[str] = []
    sections: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("  "):
            sections[list(sections)[-1]].append(line)
        elif line.startswith("#") and not sections:
            head.append(line)
        elif line.strip():
            sections[line.split(":")[0]] = []
    return head, sections


def _applies(section: str, key: str, resolved: dict[str, Any]) -> bool:
    """Whether a key does something in a recipe."""
    if section == "data" and key in ROW_OPTIONS:
        return resolved["data"]["task"] in ROW_OPTIONS[key]
    if section == "selection" and key in OPTIONS:
        return OPTIONS[key].applies(resolved["selection"])
    return True


def _with_comment(line: str, about: str | None) -> str:
    return f"{line:<{COMMENT_COLUMN}}  # {about}" if about else line


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
    return text.removesuffix("...\n").strip()
