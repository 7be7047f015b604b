"""The table of commands, and how one ends."""

import signal
import sys
import threading
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer
from rich.table import Table

from sift_cli.cli import asking, chatting, deltas, recipes, rows, runs, sharing, studies
from sift_cli.cli.checks import check_arguments
from sift_cli.cli.options import Json, print_json, print_table
from sift_cli.errors import ExitCode, SiftError
from sift_cli.system.faults import fault_of
from sift_cli.system.late import wait_for_calls
from sift_cli.system.launch import launched
from sift_cli.system.terminal import spell_out, visible
from sift_cli.system.threads import spin_briefly

app = typer.Typer(
    help="Sparse fine-tuning: adapt a model by changing 1 % of its entries, and ship the change.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Options of every command; `debug` is read in `main`."""
    if version:
        from sift_cli import __version__

        typer.echo(__version__)
        raise typer.Exit


def env(as_json: Json = False) -> None:
    """Print versions and devices, for a bug report.

    Example: sift env
    """
    from sift_cli.system.environment import describe

    facts = describe()
    if as_json:
        print_json(facts)
        return
    table = Table("what", "is", show_header=False)
    for name, value in facts.items():
        table.add_row(name, str(value))
    print_table(table)


COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Train and use": {
        "train": runs.train,
        "eval": runs.evaluate,
        "predict": asking.predict,
        "chat": chatting.chat,
    },
    "Deltas": {
        "merge": deltas.merge,
        "inspect": deltas.inspect,
        "diff": deltas.diff,
        "export": deltas.export,
    },
    "Measure and plan": {
        "plan": studies.plan,
        "compare": studies.compare,
        "probe": studies.probe,
    },
    "Show and share": {"report": sharing.report, "push": sharing.push},
    "Help": {"env": env},
}
RECIPES: dict[str, Callable[..., None]] = {
    "ls": recipes.ls,
    "show": recipes.show,
    "cp": recipes.cp,
    "schema": recipes.schema,
    "policies": recipes.policies,
}

for panel, commands in COMMANDS.items():
    for name, function in commands.items():
        app.command(name, rich_help_panel=panel)(function)
GROUPS: dict[str, tuple[str, str, dict[str, Callable[..., None]]]] = {
    "data": ("Rows as a model sees them.", "Measure and plan", {"show": rows.show}),
    "recipes": ("Shipped recipes and policies.", "Help", RECIPES),
}
for name, (about, panel, commands) in GROUPS.items():
    group = typer.Typer(no_args_is_help=True)
    for inner, function in commands.items():
        group.command(inner)(function)
    app.add_typer(group, name=name, help=about, rich_help_panel=panel)


def main() -> None:
    """The console script: a user's mistake becomes a message and an exit code, no traceback."""
    debug = "--debug" in sys.argv
    untouched = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if untouched and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clean up, exit 130
    spell_out()
    wait_for_calls()
    spin_briefly()
    try:
        check_arguments(sys.argv[1:])
        app(prog_name="sift")
    except SiftError as error:
        if debug:
            raise
        _end(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(int(ExitCode.INTERRUPTED))
    except Exception as error:
        if debug:
            raise
        if fault := fault_of(error):
            _end(fault)
        print(
            f"sift failed, and should not have: {type(error).__name__}: {error}\n"
            "`sift --debug ...` shows where; `sift env` belongs into a report",
            file=sys.stderr,
        )
        sys.exit(int(ExitCode.BUG))


def _end(error: SiftError) -> NoReturn:
    if error.first or not launched().local:  # what each process finds is told once a node
        print(visible(str(error)), file=sys.stderr)
    sys.exit(int(error.code))
