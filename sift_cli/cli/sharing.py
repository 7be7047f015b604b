"""Commands that show a finished run to others."""

from pathlib import Path
from typing import Annotated

import typer

from sift_cli.cli.checks import check_runs
from sift_cli.cli.options import Json, print_json, stderr, stdout

RunFolder = Annotated[Path, typer.Argument(help="A run folder.")]


def report(
    run: RunFolder,
    probe: Annotated[
        Path | None, typer.Option(help="A folder of `sift probe`, to show what it found.")
    ] = None,
    texts: Annotated[
        bool, typer.Option(help="Show the texts of the most confident mistakes.")
    ] = True,
) -> None:
    """Make the run's report anew: one page and its plots.

    Example: sift report runs/rte
    """
    check_runs([run])
    from sift_cli.analysis.report import report as make

    stdout.print(f"{make(run, probe=probe, texts=texts)}")


def push(
    run: RunFolder,
    repo: Annotated[str, typer.Option(help="The repository, as NAME or OWNER/NAME.")],
    private: Annotated[
        bool, typer.Option("--private/--public", help="Who may see a repository that is made now.")
    ] = True,
    texts: Annotated[
        bool, typer.Option("--texts", help="Leave texts of the data in the report.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload a run's delta, card and report to the model hub.

    Example: sift push runs/rte --repo me/rte-sift
    """
    check_runs([run])
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from sift_cli.analysis.push import push as run_push

    if not stderr.is_terminal:
        disable_progress_bars()
    address = run_push(run, repo, private=private, texts=texts)
    if as_json:
        print_json({"repo": address})
        return
    stdout.print(address)
