"""The tables and sentences of the commands that plan and compare."""

import re
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from sift_cli.cli.options import print_table, size, stdout

PARTS = {
    "weights": "weights",
    "positions": "positions",
    "base_values": "base values",
    "masters": "masters",
    "gradients": "gradients",
    "moments": "moments",
    "activations": "activations",
    "transient": "transient",
    "peak": "peak",
}


def show_plan(found: Mapping[str, Any], show_all: bool) -> None:
    """Prints what `sift plan` found; `show_all` lists the values that are defaults as well."""
    _show_recipe(found, show_all)
    for groups, title in (
        (found["by_kind"], "kind of module"),
        (together(found["by_layer"]), "layer"),
    ):
        table = Table(title, "trained", "of", "share")
        for name, group in groups.items():
            share = f"{group['trained'] / group['of']:.3%}"
            table.add_row(name, f"{group['trained']:,}", f"{group['of']:,}", share)
        _right(table)
        print_table(table)
    _show_memory(found)
    for sentence in sentences(found):
        stdout.print(sentence, highlight=False)


def _show_recipe(found: Mapping[str, Any], show_all: bool) -> None:
    table = Table("key", "value", "from", title=f"{found['model']}, {found['architecture']}")
    table.columns[0].no_wrap = True
    for name, origin in found["origins"].items():
        if show_all or origin != "default":
            section, _, key = name.partition(".")
            table.add_row(name, str(found["recipe"][section][key]), _short(origin))
    print_table(table)
    defaults = sum(origin == "default" for origin in found["origins"].values())
    if not show_all:
        stdout.print(f"{defaults} more at their defaults; --all shows them", highlight=False)


def together(layers: Mapping[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Runs of layers that are alike as one: `layer 0` to `layer 5` become `0-5`, each."""
    runs: list[tuple[str, str, dict[str, int]]] = []
    for name, group in layers.items():
        if runs and runs[-1][2] == group and name.startswith("layer"):
            runs[-1] = (runs[-1][0], name, group)
        else:
            runs.append((name, name, group))
    return {
        first if first == last else f"{first}-{last.removeprefix('layer ')}, each": group
        for first, last, group in runs
    }


def _short(origin: str) -> str:
    """`folder/rte.yaml:3:7` -> `rte.yaml:3`."""
    if origin.startswith("--set"):
        return "--set"
    return re.sub(r"^.*?([^/]*:\d+):\d+$", r"\1", origin)


def _show_memory(found: Mapping[str, Any]) -> None:
    methods = {k: one for k, one in found["memory_of_methods"].items() if "missing" not in one}
    batch = found["batch"]
    title = f"memory of a step with {batch['rows']} rows of {batch['tokens']} tokens"
    names = [name.replace(", checkpointing", "*") for name in methods]
    table = Table("part", *names, title=title, caption="*: with train.gradient_checkpointing")
    for part, label in PARTS.items():
        values = [one.get(part, 0) for one in methods.values()]
        if any(values):
            if part == "peak":
                table.add_section()
            table.add_row(label, *(size(value) if value else "" for value in values))
    _right(table)
    print_table(table)
    for key, one in found["memory_of_methods"].items():
        if "missing" in one and "," not in key:
            stdout.print(f"{key}: {one['missing']}", highlight=False, markup=False)


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What a plan comes to."""
    trained, total = found["trained_entries"], found["total_entries"]
    said = [
        f"{trained:,} of {total:,} entries train ({trained / total:.2%}), and a head of "
        f"{found['dense_entries']:,}; the delta will take about {size(found['delta_bytes'])}."
    ]
    if found["only_in_sum"]:
        said.append("All weights compete for one budget: entries per layer are in proportion.")
    data = found["data"]
    if "missing" in data:
        said.append(f"Rows were not counted: {data['missing']}")
    else:
        rows = ", ".join(f"{count:,} {name}" for name, count in data["rows"].items())
        cut = sum(data["truncated"].values())
        said.append(
            f"{rows} rows, {cut:,} of them cut to {data['max_length']} tokens; "
            f"{data['steps']:,} steps, {data['steps_per_epoch']:,} to an epoch."
        )
    passes = ", ".join(
        f"{name} {size(parts['peak'])}" for name, parts in found["memory_of_passes"].items()
    )
    said.append(f"Other passes at their peak: {passes}.")
    device = found["device"]
    if device["fits"] is not None:
        verdict = "fits" if device["fits"] else "does not fit"
        said.append(
            f"It {verdict}: {device['needed_by']} needs {size(device['needs_bytes'])} of the "
            f"{size(device['memory_bytes'])} of {device['name']}, what libraries take aside."
        )
        if not device["fits"]:
            said.append(
                "Try train.gradient_checkpointing=true, a smaller train.batch_size with "
                "train.accumulate, model.dtype=bfloat16 or a smaller data.max_length."
            )
    if "measured" in found:
        one = found["measured"]
        said.append(
            f"Measured: {one['step_time_ms']:.0f} ms a step (median of {one['steps']}), about "
            f"{one['epoch_s']:.0f} s an epoch."
        )
    return said


def show_compare(found: Mapping[str, Any]) -> None:
    """Prints the table of `sift compare` and what is to be said of it."""
    from sift_cli.analysis.compare import LEGEND, cells, headings

    table = Table(*headings(found), title=found["task"], caption=LEGEND)
    table.columns[0].no_wrap = table.columns[3].no_wrap = True
    for row in found["rows"]:
        table.add_row(*cells(row, found["metric"]))
    _right(table)
    print_table(table)
    for note in found["notes"]:
        stdout.print(note, highlight=False)


def _right(table: Table) -> None:
    for column in table.columns[1:]:
        column.justify = "right"
