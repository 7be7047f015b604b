"""Writes docs/cli.md, the reference of every command, from the commands themselves."""

from pathlib import Path
from typing import get_args

import typer

from sift_cli.cli import app

PAGE = Path(__file__).parent.parent / "docs/cli.md"
TAKES = {str: "text", int: "integer", float: "number", Path: "path"}
INTRO = """# The command line

Every command, read from the commands themselves; `scripts/cli_reference.py` writes this page.

`sift --help` and `sift COMMAND --help` say the same. `sift --install-completion` teaches your shell
(bash, zsh, fish, PowerShell) to complete commands and options; open a new shell afterwards.
`NO_COLOR=1` takes the colours out of what a terminal shows; where no terminal is watched, output is
plain lines. Exit codes: 0 done, 1 bug, 2 usage or recipe, 3 wrong base or damaged file, 4 a number
that is not finite, 5 verification failed, 130 interrupted.
"""


def main() -> None:
    """Writes the page."""
    PAGE.write_text(reference(), encoding="utf-8")


def reference() -> str:
    """The page."""
    parts = [INTRO]
    for panel, commands in _panels().items():
        parts.append(f"\n## {panel}\n")
        for name, command in commands:
            about, _, example = (command.help or "").partition("Example: ")
            parts.append(f"\n### sift {name}\n\n{about.strip()}\n")
            if example:
                parts.append(f"\n```sh\n{example.strip()}\n```\n")
            rows = [_row(one) for one in command.params if not one.hidden]
            parts.append("\n| | takes | |\n| --- | --- | --- |\n" + "".join(rows))
    return "".join(parts)


def _panels() -> dict[str, list[tuple[str, typer.core.TyperCommand]]]:
    """The commands by the panel that `sift --help` shows them in; those of a group one by one."""
    found: dict[str, list[tuple[str, typer.core.TyperCommand]]] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        leaves = (
            {f"{name} {one}": leaf for one, leaf in inner.items()} if inner else {name: command}
        )
        found.setdefault(command.rich_help_panel, []).extend(leaves.items())
    return found


def _row(parameter: typer.core.TyperOption | typer.core.TyperArgument) -> str:
    about = parameter.help or ""
    if parameter.param_type_name == "argument":
        many = "..." if parameter.nargs == -1 else ""
        name, kind = (
            f"{(parameter.name or '').upper()}{many}",
            "" if parameter.required else "optional",
        )
    else:
        names = [*parameter.opts, *parameter.secondary_opts]
        name = ", ".join(sorted(names, key=len, reverse=True))
        kind = "" if parameter.is_flag else (parameter.metavar or _takes(parameter))
        if parameter.required:
            about += " Required."
        elif parameter.default not in (None, False, True, "") and not parameter.is_flag:
            about += f" Default: {parameter.default}."
    return f"| `{name}` | {kind} | {about.strip()} |\n"


def _takes(option: typer.core.TyperOption) -> str:
    kind = option.type_descriptor.annotation
    return TAKES[next(iter(get_args(kind)), kind)]


if __name__ == "__main__":
    main()
