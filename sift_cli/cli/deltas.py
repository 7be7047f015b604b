"""Commands that work on delta files."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from sift_cli.cli.options import Base, Json, print_json, size, stdout

SHOWN = 20  # rows of the table of overlaps


def merge(
    deltas: Annotated[list[Path], typer.Argument(help="Delta files or run folders, of one base.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    base: Base = None,
    scale: Annotated[float, typer.Option(help="How much of the whole change; may be < 0.")] = 1.0,
    weight: Annotated[
        list[float] | None,
        typer.Option(help="How much each delta counts, in their order; 1 if not given."),
    ] = None,
    rule: Annotated[str, typer.Option(help="How deltas join: sum, ties or dare.")] = "sum",
    keep: Annotated[
        float | None,
        typer.Option(help="Share of each delta's entries that ties (largest) or dare keeps."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the entries that dare drops.")] = 0,
    head: Annotated[
        Path | None, typer.Option(help="The delta that head and labels come from.")
    ] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="Turn the merged model given as --base back.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify", help="Read the files back, reload the model, compare logits."
        ),
    ] = True,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Also score the result on the recipe's data.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write base + delta(s) as a Hugging Face folder, and prove it equal to the trained model."""
    from sift_cli.delta import merge as run

    report = run(
        deltas,
        out,
        base=base,
        weights=weight or (),
        rule=rule,
        scale=scale,
        keep=keep,
        seed=seed,
        head=head,
        undo=undo,
        verify=verify,
        evaluate=evaluate,
    )
    if as_json:
        print_json(report)
        return
    if "overlaps" in report:
        stdout.print(_overlap_table(report))
    for sentence in _merged(report, undo):
        stdout.print(sentence, highlight=False)


def _overlap_table(report: dict[str, Any]) -> Table:
    """The weights on which deltas meet most often."""
    rows = report["overlaps"]
    keys = ("deltas", "entries", "collisions", "sign_conflicts", "changed")
    most = sorted(rows, key=lambda name: (-rows[name]["collisions"], name))[:SHOWN]
    left = len(rows) - len(most)
    table = Table(
        Column("weight", overflow="fold"),
        *(key.replace("_", " ") for key in keys),
        caption=f"{left} more weights; --json lists them all" if left else None,
    )
    for name in most:
        table.add_row(name, *(f"{rows[name][key]:,}" for key in keys))
    if len(rows) > 1:
        total = report["overlap"]
        table.add_row("all", "", *(f"{total[key]:,}" for key in keys[1:]))
    return table


def _merged(report: dict[str, Any], undo: bool) -> list[str]:
    """What a merge did and proved, in sentences."""
    verified = report["verified"]
    said = [
        f"{report['out']}: {report['changed']} of {report['tensors']} tensors changed, "
        f"{size(report['bytes'])}"
    ]
    if "composed" in report:
        if report["head"]:
            said.append(f"The head is that of {report['head']}, whole and unscaled.")
        said.append("sift/composed.safetensors in it is the change as one delta, for --undo.")
    else:
        said[0] += f"; each equals the {'base' if undo else 'trained'} one bit for bit"
    if "files" in verified:
        said.append("Read back from disk, every tensor is as written.")
    if "logits" in verified:
        said.append(f"Reloaded, logits differ by {report['logits_difference']:g}.")
    if "metrics" in report:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in report["metrics"].items())
        same = ", as after training" if "metrics" in verified else ""
        said.append(f"Scored: {scores}{same}.")
    if report["dropped"]:
        said.append(
            f"{_tensors(report['dropped'])} of the base, not in the model: "
            + ("left out for good." if report["lost"] else "kept aside in sift/, for --undo.")
        )
    elif report["lost"]:
        said.append(f"{_tensors(report['lost'])} of the base were not in the merged folder.")
    if report["rounded"]:
        said.append(
            f"{_tensors(report['rounded'])} stay in the dtype that the model was trained in: "
            "the base's own is wider."
        )
    return said


def _tensors(names: list[str]) -> str:
    return (
        f"1 tensor ({names[0]})" if len(names) == 1 else f"{len(names)} tensors ({names[0]}, ...)"
    )
