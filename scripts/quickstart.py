"""The quickstarts: train, merge, evaluate and ask with the same commands that a user types.

usage: quickstart.py [llm] [--svg]

`llm` tunes a language model in place of a classifier. `--svg` also writes the picture that the
pages show.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

SENTENCES = [
    "The soup was cold and nobody seemed to care.",
    "Not one page of it bored me.",
    "The lens is sharp, but the shutter broke within a week.",
]
MESSAGE = "Coffee with Lena at the Blue Door, Friday at noon."
console = Console(record=True)


def sift(*args: str) -> dict[str, Any]:
    """Runs one command and returns what it printed as JSON; progress goes to the terminal."""
    console.print(f"[bold]$ sift {shlex.join(args)}[/bold]", highlight=False)
    command = [str(Path(sys.executable).parent / "sift"), *args, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def tuned(recipe: str, run: Path, title: str) -> tuple[Path, Table]:
    """Trains, merges and evaluates: the merged folder, and a table of what came out.

    Ends the script where the merged model does not score what the trained one did.
    """
    merged = run / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    summary = sift("train", recipe, "--out", str(run), "--overwrite")
    sift("merge", str(run / "delta.safetensors"), "--out", str(merged))
    again = sift("eval", str(merged))["metrics"]
    if again != summary["metrics"]:
        sys.exit("the merged model does not score what the trained one did")

    table = Table("", "value", title=title, title_justify="left")
    for name, value in summary["metrics"].items():
        table.add_row(f"{name} before training", str(summary["metrics_before"][name]))
        table.add_row(f"{name} after training", str(value))
        table.add_row(f"{name} after merging", str(again[name]))
    trained, total = summary["trained_entries"], summary["total_entries"]
    table.add_row("trained entries", f"{trained:,} of {total:,} ({trained / total:.2%})")
    if summary["dense_entries"]:
        table.add_row("trained head", f"{summary['dense_entries']:,}")
    table.add_row("delta file", f"{summary['delta_bytes'] / 1e3:,.0f} kB")
    table.add_row("wall time of training", f"{summary['wall_time_s']:.0f} s")
    table.add_row("peak memory", f"{summary['peak_memory_bytes'] / 1e6:,.0f} MB")
    return merged, table


def reviews() -> Table:
    """MiniLM learns what reviews say."""
    merged, table = tuned("quickstart", Path("runs/quickstart"), "MiniLM on builtin:reviews")
    for one in sift("predict", str(merged), *SENTENCES)["predictions"]:
        table.add_row(f'"{one["text"]}"', f"{one['label']} ({one['probability']:.0%})")
    return table


def notes() -> Table:
    """SmolLM2 learns to answer messages in one line of a fixed form."""
    recipe = "instruct/quickstart"
    base = yaml.safe_load(Path(f"recipes/{recipe}.yaml").read_text())["model"]["path"]
    before = answer(base)
    merged, table = tuned(recipe, Path("runs/quickstart-llm"), "SmolLM2-135M on builtin:notes")
    table.add_row("asked", MESSAGE)
    table.add_row("answered before", before)
    table.add_row("answered after", answer(str(merged)))
    return table


def answer(model: str) -> str:
    """What a model answers to the message."""
    said: str = sift("chat", model, "--once", MESSAGE)["answer"]
    return said


def picture(title: str) -> str:
    """All that was printed as an SVG, in the reader's own monospace font: nothing to fetch."""
    svg = console.export_svg(title=title)
    svg = re.sub(r"@font-face {.*?}", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", "monospace")


def main() -> None:
    """Runs the commands and prints one table."""
    name = "quickstart-llm" if "llm" in sys.argv else "quickstart"
    console.print(notes() if "llm" in sys.argv else reviews())
    if "--svg" in sys.argv:
        Path(f"docs/{name}.svg").write_text(picture(f"make {name}"))


if __name__ == "__main__":
    main()
