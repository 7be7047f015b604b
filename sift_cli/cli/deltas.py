"""Commands that work on delta files."""

from pathlib import Path
from typing import Annotated

import typer

from sift_cli.cli.options import Base, Json, print_json, stdout


def merge(
    delta: Annotated[Path, typer.Argument(help="A delta file.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    base: Base = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="Turn the merged model given as --base back.")
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not load the result and compare its logits.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write base + delta as a Hugging Face folder, and prove it equal to the trained model.

    Example: sift merge runs/rte/delta.safetensors --out runs/rte/merged
    """
    from sift_cli.delta import merge as run

    report = run(delta, out, base=base, undo=undo, verify=not no_verify)
    if as_json:
        print_json(report)
        return
    said = f"{report['changed']} of {report['tensors']} tensors changed, each equal to the "
    said += "base's bit for bit" if undo else "trained one bit for bit"
    if "logits_difference" in report:
        said += f"; reloaded, logits differ by {report['logits_difference']:g}"
    stdout.print(f"{out}: {said}")
