"""Commands that work on delta files."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from sift_cli.cli.options import Base, Json, print_json, print_table, size, stdout
from sift_cli.errors import SiftError

DeltaFile = Annotated[str, typer.Argument(help="A delta file, or a run folder that holds one.")]
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
    """Write base + delta(s) as a Hugging Face folder, and prove it equal to the trained model.

    Example: sift merge runs/rte/delta.safetensors --out runs/rte/merged
    """
    from sift_cli.convert import merge as run

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
        print_table(_overlap_table(report))
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
    """Make a delta from two dense models: exact, or the largest changes.

    Example: sift diff roberta-base my-tuned-model --out delta.safetensors
    """
    from sift_cli.convert.difference import difference

    made = difference(base, tuned, out, density=density, scope=scope, dtype=dtype)
    if as_json:
        print_json(made)
        return
    share = made["changed"] / made["total_entries"]
    head = f"; new, stored whole: {', '.join(made['dense'])}" if made["dense"] else ""
    stdout.print(
        f"{made['changed']:,} of {made['total_entries']:,} entries differ ({share:.2%}){head}",
        highlight=False,
        markup=False,
    )
    if made["exact"]:
        said = "all kept: base + delta is the tuned model, bit for bit"
    else:
        part = made["norm_share"]
        said = f"{made['kept']:,} kept, with {part:.1%} of the change's norm: not exact"
    stdout.print(f"{out}: {size(made['delta_bytes'])}; {said}", highlight=False, markup=False)
    for note in made["notes"]:
        stdout.print(f"note: {note}", highlight=False, markup=False)


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
    """Write a delta as an adapter that PEFT loads.

    Example: sift export runs/rte --to peft --out runs/rte/peft
    """
    if to != "peft":
        raise SiftError(f"--to {to}: sift writes peft")
    from sift_cli.convert.export import describe
    from sift_cli.convert.export import export as run
    from sift_cli.runs.folder import delta_file

    report = run(
        delta_file(delta), out, base=base, whole=whole, partial=partial, verify=not no_verify
    )
    if as_json:
        print_json(report)
        return
    for line in describe(report):
        stdout.print(line, highlight=False, markup=False)
    difference = report["logits_difference"]
    proof = "not loaded back: peft is not installed (pip install 'sift-cli[peft]')"
    if no_verify:
        proof = "not loaded back"
    elif difference is not None:
        proof = f"loaded with PEFT, logits differ by {difference:.3g}"
    stdout.print(f"{out}: {size(report['bytes'])}; {proof}", highlight=False, markup=False)


def inspect(
    delta: DeltaFile,
    base: Annotated[
        str | None, typer.Option(help="The base model: adds exact norms, and is checked.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A PNG to write: density by layer and kind of module.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show where a delta changes its model, how far, and where it comes from; needs no model.

    Example: sift inspect runs/rte --out runs/rte/density.png
    """
    from sift_cli.analysis.inspect import bands
    from sift_cli.analysis.inspect import inspect as run
    from sift_cli.runs.folder import delta_file

    found = run(delta_file(delta), base=base, out=out)
    if as_json:
        print_json(found)
        return
    for name, value in _provenance(found).items():
        stdout.print(f"{name + ':':<12}{value}", highlight=False, markup=False)
    _density_table("kind of module", {kind: [row] for kind, row in found["kinds"].items()}, found)
    groups = {
        label: [found["layers"][one] for one in part] for label, part in bands(found["layers"])
    }
    _density_table("layer", groups, found)
    table = Table("an entry moved by", "entries", "share", title="how far, as the bits tell")
    for move, count in found["moves"].items():
        table.add_row(move, f"{count:,}", f"{count / max(1, found['entries']):.1%}")
    print_table(table)
    if out is not None:
        stdout.print(f"Heat map: {out}", highlight=False, markup=False)


def _provenance(found: dict[str, Any]) -> dict[str, str]:
    """What a delta says of itself, a line each."""
    base, made = found["base"], found.get("difference")
    revision = f" at {base['revision']}" if base["revision"] else ""
    lines = {
        "file": f"{found['file']}, {size(found['bytes'])}; {found['integrity']}",
        "sha256": found["sha256"],
        "base": f"{base['path']}{revision}, {base['dtype']}",
        "model": found["architecture"] + (f", task {found['task']}" if found["task"] else ""),
        "labels": "a score" if found["labels"] is None else ", ".join(found["labels"]),
        "made by": f"policy {found['policy']}"
        + "".join(f", {name} {number}" for name, number in found["versions"].items()),
    }
    if made:
        kept = "exact" if made["exact"] else f"{made['norm_share']:.1%} of the change's norm"
        lines["from"] = f"{made['tuned']}, {kept}"
    if found["metrics"]:
        lines["metrics"] = ", ".join(f"{n} {v:.4f}" for n, v in found["metrics"].items())
    lines["entries"] = (
        f"{found['entries']:,} of {found['size']:,} in {found['weights']} weights "
        f"({found['density']:.2%}); {found['survived']:.2%} survived rounding"
    )
    if found["dense"]:
        lines["new, whole"] = f"{', '.join(found['dense'])} ({found['dense_entries']:,} entries)"
    if found["base_checked"]:
        lines["size"] = f"{found['norm']:.4g}, {found['relative']:.3%} of the weights' norm"
    return lines


def _density_table(
    head: str, groups: dict[str, list[dict[str, Any]]], found: dict[str, Any]
) -> None:
    """Sums of the rows of each group: weights, entries, density, survivors, relative change."""
    columns = [head, "weights", "entries", "density", "survived"]
    table = Table(*columns, *(["change"] if found["base_checked"] else []))
    table.columns[0].overflow = "fold"
    for name, rows in groups.items():
        weights, entries, whole = (
            sum(row[k] for row in rows) for k in ("weights", "entries", "size")
        )
        alive = sum(row["survived"] * row["entries"] for row in rows) / max(1, entries)
        cells = [name, str(weights), f"{entries:,}", f"{entries / whole:.2%}", f"{alive:.1%}"]
        if found["base_checked"]:
            norm, base = (sum(row[k] ** 2 for row in rows) ** 0.5 for k in ("norm", "base_norm"))
            cells.append(f"{norm / base:.2%}" if base else "")
        table.add_row(*cells)
    print_table(table)
