"""Commands that work on delta files."""

from pathlib import Path
from typing import Annotated

import typer

from sift_cli.cli.options import Base, Json, print_json, size, stdout
from sift_cli.errors import SiftError

DeltaFile = Annotated[str, typer.Argument(help="A delta file, or a run folder that holds one.")]


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
    """Write base + delta as a Hugging Face folder, and prove it equal to the trained model."""
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


def diff(
    base: Annotated[str, typer.Argument(help="The base model: a folder or hub id.")],
    tuned: Annotated[str, typer.Argument(help="The tuned model: a folder or hub id.")],
    out: Annotated[Path, typer.Option(help="The delta file to write.")],
    density: Annotated[
        float | None, typer.Option(help="Keep the largest changes within this share of entries.")
    ] = None,
    scope: Annotated[
        str, typer.Option(help="Where entries compete: tensor (each weight), or global.")
    ] = "tensor",
    dtype: Annotated[
        str | None, typer.Option(help="Hold both in float32 or bfloat16, not as they are stored.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a delta from two dense models: exact, or the largest changes."""
    from sift_cli.delta.difference import difference

    made = difference(base, tuned, out, density=density, scope=scope, dtype=dtype)
    if as_json:
        print_json(made)
        return
    share = made["changed"] / made["total_entries"]
    head = f"; new, stored whole: {', '.join(made['dense'])}" if made["dense"] else ""
    stdout.print(
        f"{made['changed']:,} of {made['total_entries']:,} entries differ ({share:.2%}){head}",
        highlight=False,
    )
    if made["exact"]:
        said = "all kept: base + delta is the tuned model, bit for bit"
    else:
        part = made["norm_share"]
        said = f"{made['kept']:,} kept, with {part:.1%} of the change's norm: not exact"
    stdout.print(f"{out}: {size(made['delta_bytes'])}; {said}", highlight=False)
    for note in made["notes"]:
        stdout.print(f"note: {note}", highlight=False)


def export(
    delta: DeltaFile,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="The layout: peft.")] = "peft",
    base: Base = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Store whole what the layout has no sparse form for.")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Leave out what the layout does not hold.")
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not load the result and compare its logits.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a delta as an adapter that PEFT loads."""
    if to != "peft":
        raise SiftError(f"--to {to}: sift writes peft")
    from sift_cli.delta.export import describe
    from sift_cli.delta.export import export as run
    from sift_cli.delta.tuned import delta_file

    report = run(
        delta_file(delta), out, base=base, whole=whole, partial=partial, verify=not no_verify
    )
    if as_json:
        print_json(report)
        return
    for line in describe(report):
        stdout.print(line, highlight=False)
    difference = report["logits_difference"]
    proof = "not loaded back: peft is not installed (pip install 'sift-cli[peft]')"
    if no_verify:
        proof = "not loaded back"
    elif difference is not None:
        proof = f"loaded with PEFT, logits differ by {difference:.3g}"
    stdout.print(f"{out}: {size(report['bytes'])}; {proof}", highlight=False)
