"""The tables and sentences of the commands that plan and compare."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from sift_cli.cli.options import print_table, size, stdout
from sift_cli.tasks.metrics import shown
from sift_cli.tasks.table import language_facts

if TYPE_CHECKING:
    from sift_cli.analysis.table import Comparison
    from sift_cli.tasks.metrics import ClassScore


def show_plan(plan: Mapping[str, Any], show_all: bool) -> None:
    """Prints a plan as a person reads it; `show_all` lists the values that are defaults as well."""
    _show_recipe(plan, show_all)
    known = not plan["only_in_sum"]
    layers = plan["by_layer"]
    if not known:  # how many of each train is not
        layers = {name: {"of": group["of"]} for name, group in layers.items()}
    for groups, title in (
        (plan["by_kind"], "kind of module"),
        (together(layers), "layer"),
    ):
        table = Table(title, *(("trained", "of", "share") if known else ("targeted entries",)))
        for name, group in groups.items():
            own = [f"{group['of']:,}"]
            if known:
                trained, of = group["trained"], group["of"]
                own = [f"{trained:,}", *own, f"{trained / of:.3%}"]
            table.add_row(name, *own)
        _right(table)
        print_table(table)
    _show_memory(plan)
    for sentence in sentences(plan):
        stdout.print(sentence, highlight=False)


def _show_recipe(plan: Mapping[str, Any], show_all: bool) -> None:
    table = Table("key", "value", "from", title=f"{plan['model']}, {plan['architecture']}")
    table.columns[0].no_wrap = True
    for name, origin in plan["origins"].items():
        section, _, key = name.partition(".")
        idle = plan["whole"] and section == "selection" and origin.startswith("policy ")
        if show_all or not (idle or origin == "default"):
            table.add_row(name, str(plan["recipe"][section][key]), _short(origin))
    print_table(table)
    defaults = sum(origin == "default" for origin in plan["origins"].values())
    if not show_all:
        stdout.print(f"{defaults} more at their defaults; --all shows them", highlight=False)


def together(layers: Mapping[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Neighbouring layers with the same counts as one: `layer 0-5, each`."""
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
    """An origin without folder and column: `folder/rte.yaml:3:7` becomes `rte.yaml:3`."""
    if origin.startswith("--set"):
        return "--set"
    return re.sub(r"^.*?([^/]*:\d+):\d+$", r"\1", origin)


def _show_memory(plan: Mapping[str, Any]) -> None:
    methods = {k: parts for k, parts in plan["memory_of_methods"].items() if "missing" not in parts}
    batch = plan["batch"]
    title = f"memory of a step with {batch['rows']} rows of {batch['tokens']} tokens"
    names = [name.replace(", checkpointing", "*") for name in methods]
    table = Table("part", *names, title=title, caption="*: with train.gradient_checkpointing")
    for part in max(methods.values(), key=len):
        values = [parts.get(part, 0) for parts in methods.values()]
        if any(values):
            if part == "peak":
                table.add_section()
            sizes = (size(value) if value else "" for value in values)
            table.add_row(part.replace("_", " "), *sizes)
    _right(table)
    print_table(table)
    for key, parts in plan["memory_of_methods"].items():
        if "missing" in parts and "," not in key:
            stdout.print(f"{key}: {parts['missing']}", highlight=False, markup=False)


def sentences(plan: Mapping[str, Any]) -> list[str]:
    """A plan in sentences: what trains, the rows, the passes, and whether it fits the device."""
    passes = ", ".join(
        f"{name} {size(parts['peak'])}" for name, parts in plan["memory_of_passes"].items()
    )
    lines = [*_entries_sentences(plan), *_data_sentences(plan)]
    lines.append(f"Other passes at their peak: {passes}.")
    if "sent_by_part" in plan:
        lines += _rows_sentences(plan)
    elif "sent_bytes" in plan:
        sent = {name: size(nbytes) for name, nbytes in plan["sent_bytes"].items()}
        lines.append(
            f"On {plan['devices']:,} devices, of which memory is that of each, every one sends "
            f"{sent['sift']} a step; LoRA of equal size would send {sent['lora']}, full "
            f"fine-tuning {sent['full']}."
        )
    return lines + _device_sentences(plan)


def _entries_sentences(plan: Mapping[str, Any]) -> list[str]:
    """What trains, what of the model cannot be chosen, and where a new head starts."""
    trained, total = plan["trained_entries"], plan["total_entries"]
    vectors = plan["vector_entries"]
    among = f", {vectors:,} of them biases and norms that train whole," if vectors else ","
    head = f" and a head of {plan['dense_entries']:,}"
    if "format" in plan["data"] and not plan["dense_entries"]:
        among, head = among.rstrip(","), ""
    lines = [
        f"{trained:,} of {total:,} entries train ({trained / total:.2%}){among}{head}; the delta "
        f"will take about {size(plan['delta_bytes'])}."
    ]
    if plan["only_in_sum"]:
        lines.append(
            "All weights compete for one budget: how many entries of each train shows when they "
            "are chosen."
        )
    if plan["whole"]:
        lines.append("All of the targeted entries train: none is chosen.")
    if plan["left_out"]:
        entries = sum(kind["of"] for kind in plan["left_out"].values())
        lines.append(
            f"all-linear leaves out {entries:,} entries of no linear layer, which can be named in "
            f"selection.target: {', '.join(plan['left_out'])}."
        )
    start = plan["head_start"]
    if start["kind"] != "random":
        rows = f" of {start['rows']:,} rows" if start["rows"] else ""
        lines.append(f"A new head starts from a {start['kind']}{rows}.")
    return lines


def _data_sentences(plan: Mapping[str, Any]) -> list[str]:
    """The rows, the steps that they make, and what runs beside these."""
    data = plan["data"]
    if "missing" in data:
        return [f"Rows were not counted: {data['missing']}"]
    steps = f"{data['steps']:,} steps, {data['steps_per_epoch']:,} to an epoch"
    if "format" in data:
        lines = _language_sentences(data)
        lines.append(f"{steps}; a step has about {data['tokens_per_step']:,.0f} tokens.")
    else:
        rows = ", ".join(f"{count:,} {name}" for name, count in data["rows"].items())
        cut, most = sum(data["truncated"].values()), data["max_length"]
        lines = [f"{rows} rows, {cut:,} of them cut to {most} tokens; {steps}."]
    return lines + _passes_sentences(plan)


def _device_sentences(plan: Mapping[str, Any]) -> list[str]:
    """Whether it fits the device and what to try if not; how long steps take, if measured."""
    lines, device = [], plan["device"]
    if device["fits"] is not None:
        verdict = "fits" if device["fits"] else "does not fit"
        lines.append(
            f"It {verdict}: {device['needed_by']} needs {size(device['needs_bytes'])} of the "
            f"{size(device['memory_bytes'])} of {device['name']}, beside what libraries take."
        )
        if not device["fits"]:
            lines.append(
                "Try train.gradient_checkpointing=true, a smaller train.batch_size with "
                "train.accumulate, model.dtype=bfloat16 or a smaller data.max_length."
            )
    if "measured" in plan:
        timed = plan["measured"]
        lines.append(
            f"Measured: {timed['begin_s']:.0f} s until entries are chosen, "
            f"{timed['step_time_ms']:.0f} ms a step (median of {timed['steps']}), about "
            f"{timed['epoch_s']:.0f} s an epoch; {timed['run_s']:.0f} s in all, evaluations aside."
        )
    return lines


def _rows_sentences(plan: Mapping[str, Any]) -> list[str]:
    """What each device sends where the model lies in rows on several."""
    devices, copies = plan["devices"], plan["replicas"]
    copied = f" as {copies:,} copies" if copies > 1 else ""
    parts = {
        method: ", ".join(
            f"{purpose.replace('_', ' ')} {size(nbytes)}"
            for purpose, nbytes in each.items()
            if nbytes or purpose != "between_copies"
        )
        for method, each in plan["sent_by_part"].items()
    }
    return [
        f"In rows on {devices:,} devices{copied}; memory is that of each, and gathered are the "
        "weights that are whole there at one time. Counted by rings and not measured, each sends "
        f"in a step: {parts['sift']}; LoRA of equal size: {parts['lora']}; full fine-tuning: "
        f"{parts['full']}."
    ]


def _passes_sentences(plan: Mapping[str, Any]) -> list[str]:
    """What runs forward and backward beside the steps: warm-up, choices, trials of rates."""
    data, lines = plan["data"], []
    first, chosen = data["selection_batches"]["first"], data["selection_batches"]["all"]
    asked = data["selection_batches"]["asked"]
    if data["warmup_steps"]:
        lines.append(f"{data['warmup_steps']:,} steps warm up before entries are chosen.")
    if chosen > 1:
        all_ = f" (selection.batches is {asked:,}: the run has no more)" if first < asked else ""
        later = f", and anew by {chosen - first:,} along the run" if chosen > first else ""
        lines.append(
            f"Entries are chosen by {first:,} batches{all_}{later}, each run forward and backward."
        )
    if data["trial_steps"]:
        beside = data["trial_passes"] - data["trial_steps"]
        more = f", and {beside:,} batches ahead of them," if beside else ""
        lines.append(
            f"The learning rate is left open: {data['trial_steps']:,} more steps{more} try rates "
            "before, or up to two fifths more where the best one lies at the edge."
        )
    if data["passes"] > data["steps"]:
        lines.append(f"In all {data['passes']:,} batches run forward and backward.")
    return lines


def _language_sentences(data: Mapping[str, Any]) -> list[str]:
    """The format of the rows of a language task, how they become tokens, and what splits come to.

    `data` are those of a plan.
    """
    from sift_cli.tasks.token_rows import SplitCounts

    facts = "; ".join(f"{key}: {said}" for key, said in language_facts(data["language"]).items())
    lines = [f"Rows are {data['format']}; {facts}."]
    for name, counts in data["splits"].items():
        lines.append(" ".join([f"{name.capitalize()}:", *SplitCounts(**counts).sentences()]))
    return lines


def show_probe(probe: Mapping[str, Any]) -> None:
    """Prints what `sift probe` measured: the share of the gradient that each mask keeps."""
    table = Table(
        "mask",
        "first",
        "mean",
        "last",
        "replaced",
        "moment lost",
        "a bias",
        "one step",
        title=f"share of the gradient's norm kept over {probe['steps']} steps",
        caption="replaced: share of the entries, moment lost: share of Adam's, at each step; "
        "a bias: share of the first gradient's kept energy that a bias could do; one step: how far "
        "it moves a layer's outputs at the rate, mean over layers",
    )
    for name, kept in probe["kept_norm_share"].items():
        shares = [f"{kept[key]:.3f}" for key in ("first", "mean", "last")]
        rest = [
            kept["replaced_per_step"],
            kept["second_moment_lost_per_step"],
            kept["bias_energy_share"]["first"],
            kept["output_step"]["mean"],
        ]
        table.add_row(name, *shares, *(f"{value:.3f}" for value in rest))
    print_table(table)
    for sentence in probe["says"]:
        stdout.print(sentence, highlight=False)


def show_compare(comparison: "Comparison") -> None:
    """Prints the table of `sift compare` and its notes."""
    from sift_cli.analysis.table import cells, headings, legend

    table = Table(*headings(comparison), title=comparison.task, caption=legend(comparison))
    table.columns[0].no_wrap = table.columns[3].no_wrap = True
    for row in comparison.rows:
        style = "bold" if row is comparison.best else None
        table.add_row(*cells(row, comparison.metric), style=style)
    _right(table)
    print_table(table)
    for note in comparison.notes:
        stdout.print(note, highlight=False)


def show_benchmarks(stored: Mapping[str, Any], runs: Sequence[str]) -> None:
    """Prints what runs have stored of benchmarks; nothing where they have none."""
    if not stored:
        return
    table = Table("task", "metric", *(Path(run).name for run in runs), "how", title="benchmarks")
    for row in stored["benchmarks"]:
        values = ("" if value is None else shown(value) for value in row["values"])
        table.add_row(escape(row["task"]), escape(row["metric"]), *values, escape(row["way"]))
    print_table(table)


def show_classes(classes: Sequence["ClassScore"], suffix: str) -> None:
    """Prints how well each class is told, of the split whose metrics have that suffix."""
    table = Table(f"class{suffix}", "precision", "recall", "f1", "rows")
    for one in classes:
        values = (shown(value) for value in (one.precision, one.recall, one.f1))
        table.add_row(escape(one.name), *values, f"{one.rows:,}")
    _right(table)
    print_table(table)


def _right(table: Table) -> None:
    for column in table.columns[1:]:
        column.justify = "right"
