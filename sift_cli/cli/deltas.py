"""Commands that work on delta files."""

from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from sift_cli.cli.checks import check_delta, check_tuned
from sift_cli.cli.options import BaseModelPath, Json, print_json, print_table, size, stdout
from sift_cli.errors import SiftError
from sift_cli.tasks.metrics import shown
from sift_cli.tasks.table import language_facts

if TYPE_CHECKING:
    from sift_cli.convert.changes import Composition
    from sift_cli.convert.merge import Merged

DeltaFile = Annotated[str, typer.Argument(help="A delta file, or a run folder that holds one.")]
SHOWN_OVERLAPS = 20  # rows of the table of overlaps
COLUMNS = {  # of what `sift inspect` shows of each part
    "density": "density",
    "change": "relative",
    "moved far": "moved_far",
    "new sign": "new_sign",
    "rows": "half_in_rows",
    "columns": "half_in_columns",
    "survived": "survived",
}
ALWAYS = ("relative", "moved_far")  # the change, also where it is the same everywhere
UNEVEN = (
    "moved far: to another power of two or sign; rows, columns: the share of a matrix's that hold "
    "half of its entries"
)


def merge(
    deltas: Annotated[list[Path], typer.Argument(help="Delta files or run folders, of one base.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    base: BaseModelPath = None,
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
    for delta in deltas:
        check_delta(delta)
    from sift_cli.convert.merge import merge as run

    merged = run(
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
        print_json(merged.to_json())
        return
    if merged.composition is not None and len(deltas) > 1:
        print_table(_overlap_table(merged.composition))
    for sentence in _merge_sentences(merged, undo):
        stdout.print(sentence, highlight=False)


def _overlap_table(composition: "Composition") -> Table:
    """The weights on which deltas meet most often."""
    overlaps = composition.overlaps
    most = sorted(overlaps, key=lambda name: (-overlaps[name].collisions, name))[:SHOWN_OVERLAPS]
    left = len(overlaps) - len(most)
    columns = ("deltas", "entries", "collisions", "sign conflicts", "changed")
    table = Table(
        Column("weight", overflow="fold"),
        *columns,
        caption=f"{left} more weights; --json lists them all" if left else None,
    )
    for name in most:
        table.add_row(name, *(f"{count:,}" for count in astuple(overlaps[name])))
    if len(overlaps) > 1:
        _, *counts = astuple(composition.total)
        table.add_row("all", "", *(f"{count:,}" for count in counts))
    return table


def _merge_sentences(merged: "Merged", undo: bool) -> list[str]:
    """What a merge did and proved."""
    proof = merged.proof
    lines = [
        f"{merged.out}: {merged.changed} of {merged.tensors} tensors changed, {size(merged.bytes)}"
    ]
    if merged.composition is not None:
        if merged.composition.head:
            lines.append(f"The head is that of {merged.composition.head}, whole and unscaled.")
        lines.append("sift/composed.safetensors in it is the change as one delta, for --undo.")
    else:
        lines[0] += f"; each equals the {'base' if undo else 'trained'} one bit for bit"
    if "files" in proof.verified:
        lines.append("Read back from disk, every tensor is as written.")
    if "logits" in proof.verified:
        lines.append(f"Reloaded, logits differ by {proof.logits_difference:g}.")
    if proof.metrics is not None:
        scores = ", ".join(f"{name} {shown(value)}" for name, value in proof.metrics.items())
        same = ", as after training" if "metrics" in proof.verified else ""
        lines.append(f"Scored: {scores}{same}.")
    return lines + _lost_sentences(merged)


def _lost_sentences(merged: "Merged") -> list[str]:
    """Which tensors of the base are not in what was written as they were."""
    lines = []
    if merged.dropped:
        lines.append(
            f"{_tensors(merged.dropped)} of the base, not in the model: "
            + ("left out for good." if merged.lost else "kept aside in sift/, for --undo.")
        )
    elif merged.lost:
        lines.append(f"{_tensors(merged.lost)} of the base were not in the merged folder.")
    if merged.rounded:
        lines.append(
            f"{_tensors(merged.rounded)} stay in the dtype that the model was trained in: "
            "the base's own is wider."
        )
    return lines


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
    for model in (base, tuned):
        check_tuned(model)
    from sift_cli.convert.difference import difference

    made = difference(base, tuned, out, density=density, scope=scope, dtype=dtype)
    if as_json:
        print_json(made.to_json())
        return
    origin = made.origin
    share = origin.changed / made.total_entries
    head = f"; new, stored whole: {', '.join(made.dense)}" if made.dense else ""
    stdout.print(
        f"{origin.changed:,} of {made.total_entries:,} entries differ ({share:.2%}){head}",
        highlight=False,
        markup=False,
    )
    if origin.exact:
        kept = "all kept: base + delta is the tuned model, bit for bit"
    else:
        kept = f"{made.kept:,} kept, with {origin.norm_share:.1%} of the change's norm: not exact"
    stdout.print(f"{out}: {size(made.delta_bytes)}; {kept}", highlight=False, markup=False)
    for note in made.notes:
        stdout.print(f"note: {note}", highlight=False, markup=False)


def export(
    delta: DeltaFile,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="The layout: peft.")] = "peft",
    base: BaseModelPath = None,
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
    check_delta(delta)
    from sift_cli.convert.export import export as run
    from sift_cli.runs.folder import delta_file

    exported = run(
        delta_file(delta), out, base=base, whole=whole, partial=partial, verify=not no_verify
    )
    if as_json:
        print_json(exported.to_json())
        return
    for line in exported.sentences():
        stdout.print(line, highlight=False, markup=False)
    difference = exported.logits_difference
    proof = "not loaded back: peft is not installed (pip install 'sift-cli[peft]')"
    if no_verify:
        proof = "not loaded back"
    elif difference is not None:
        proof = f"loaded with PEFT, logits differ by {difference:.3g}"
    stdout.print(f"{out}: {size(exported.bytes)}; {proof}", highlight=False, markup=False)


def inspect(
    delta: DeltaFile,
    base: Annotated[
        str | None, typer.Option(help="The base model: adds exact norms, and is checked.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A PNG to write: what is uneven by layer and module.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show where a delta changes its model, how far, and where it comes from; needs no model.

    Example: sift inspect runs/rte --out runs/rte/uneven.png
    """
    check_delta(delta)
    from sift_cli.analysis.inspect import bands, together
    from sift_cli.analysis.inspect import inspect as run
    from sift_cli.runs.folder import delta_file

    found = run(delta_file(delta), base=base, out=out)
    if as_json:
        print_json(found)
        return
    for name, value in _provenance(found).items():
        stdout.print(f"{name + ':':<12}{value}", highlight=False, markup=False)
    _uneven_table("kind of module", found["kinds"], found)
    groups = {
        label: together(found["layers"][one] for one in part)
        for label, part in bands(found["layers"])
    }
    _uneven_table("layer", groups, found, caption=UNEVEN)
    table = Table("an entry moved by", "entries", "share", title="how far, as the bits tell")
    for move, count in found["moves"].items():
        table.add_row(move, f"{count:,}", f"{count / max(1, found['entries']):.1%}")
    print_table(table)
    if out is not None:
        stdout.print(f"Heat map: {out}", highlight=False, markup=False)


def _provenance(found: dict[str, Any]) -> dict[str, str]:
    """What a delta says of itself, a line each; it need not say more than its base's path."""
    base, made = found["base"], found.get("difference")
    revision = f" at {base['revision']}" if base.get("revision") else ""
    task = f", task {found['task']}" if found.get("task") else ""
    versions = found.get("versions", {})
    lines = {
        "file": f"{found['file']}, {size(found['bytes'])}; {found['integrity']}",
        "sha256": found["sha256"],
        "base": f"{base['path']}{revision}, {base['dtype']}",
        "model": (found.get("architecture") or "not told") + task,
        **_task_lines(found),
        "made by": f"policy {found.get('policy') or 'not told'}"
        + "".join(f", {name} {number}" for name, number in versions.items()),
    }
    if made:
        kept = "exact" if made["exact"] else f"{made['norm_share']:.1%} of the change's norm"
        lines["from"] = f"{made['tuned']}, {kept}"
    if found.get("metrics"):
        lines["metrics"] = ", ".join(f"{n} {shown(v)}" for n, v in found["metrics"].items())
    lines["entries"] = (
        f"{found['entries']:,} of {found['size']:,} in {found['weights']} weights "
        f"({found['density']:.2%}{', of each alike' if found['density_even'] else ''}); "
        f"{found['survived']:.2%} survived rounding"
    )
    if found["dense"]:
        lines["new, whole"] = f"{', '.join(found['dense'])} ({found['dense_entries']:,} entries)"
    if found["base_checked"]:
        lines["size"] = f"{found['norm']:.4g}, {found['relative']:.3%} of the weights' norm"
    return lines


def _task_lines(found: dict[str, Any]) -> dict[str, str]:
    """The labels, or how the rows of a language task become tokens."""
    labels = found.get("labels")
    if found.get("language") is not None:
        return language_facts(found["language"])
    return {"labels": "a score" if labels is None else ", ".join(labels)}


def _uneven_table(
    head: str, groups: dict[str, dict[str, Any]], found: dict[str, Any], caption: str | None = None
) -> None:
    """The parts of a delta, each column but counts left out where it says the same of all."""
    columns = {
        "weights": [f"{row['weights']}" for row in groups.values()],
        "entries": [f"{row['entries']:,}" for row in groups.values()],
    }
    for name, key in COLUMNS.items():
        cells = [_percent(row.get(key)) for row in groups.values()]
        even = found["density_even"] if key == "density" else len(set(cells)) == 1
        if any(cells) and (not even or key in ALWAYS):
            columns[name] = cells
    table = Table(head, *columns, caption=caption)
    table.columns[0].overflow = "fold"
    for cells in zip(groups, *columns.values(), strict=True):
        table.add_row(*cells)
    print_table(table)


def _percent(share: float | None) -> str:
    """A share in three digits or so; nothing where there is none."""
    if share is None:
        return ""
    return f"{share:.2%}" if share < 0.1 else f"{share:.1%}"
