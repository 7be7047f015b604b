"""The quickstart: train, merge, evaluate and predict with the same commands that a user types.

`--svg` also writes the picture that README.md shows.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RECIPE = "quickstart"
RUN = Path("runs/quickstart")
SENTENCES = [
    "The soup was cold and nobody seemed to care.",
    "Not one page of it bored me.",
    "The lens is sharp, but the shutter broke within a week.",
]
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


def main() -> None:
    """Runs the four commands and prints one table."""
    merged = RUN / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    summary = sift("train", RECIPE, "--out", str(RUN), "--overwrite")
    sift("merge", str(RUN / "delta.safetensors"), "--out", str(merged))
    again = sift("eval", str(merged))["metrics"]
    predictions = sift("predict", str(merged), *SENTENCES)["predictions"]

    table = Table("", "value", title="MiniLM on builtin:reviews", title_justify="left")
    for name, value in summary["metrics"].items():
        table.add_row(f"{name} before training", str(summary["metrics_before"][name]))
        table.add_row(f"{name} after training", str(value))
        table.add_row(f"{name} after merging", str(again[name]))
    trained, total = summary["trained_entries"], summary["total_entries"]
    table.add_row("trained entries", f"{trained:,} of {total:,} ({trained / total:.2%})")
    table.add_row("trained head", f"{summary['dense_entries']:,}")
    table.add_row("delta file", f"{summary['delta_bytes'] / 1e3:,.0f} kB")
    table.add_row("wall time of training", f"{summary['wall_time_s']:.0f} s")
    table.add_row("peak memory", f"{summary['peak_memory_bytes'] / 1e6:,.0f} MB")
    for one in predictions:
        table.add_row(f'"{one["text"]}"', f"{one['label']} ({one['probability']:.0%})")
    console.print(table)
    if "--svg" in sys.argv:
        Path("docs/quickstart.svg").write_text(picture())
    if again != summary["metrics"]:
        sys.exit("the merged model does not score what the trained one did")


def picture() -> str:
    """All that was printed as an SVG, in the reader's own monospace font: nothing to fetch."""
    svg = console.export_svg(title="make quickstart")
    svg = re.sub(r"@font-face {.*?}", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", "monospace")


if __name__ == "__main__":
    main()
