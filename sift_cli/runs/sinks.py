"""Where the numbers of a run go while it runs."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sift_cli.errors import SiftError
from sift_cli.recipe import Recipe
from sift_cli.runs.callbacks import Callback, Called
from sift_cli.runs.folder import (
    DELTA_FILE,
    GRADIENT_FILE,
    METRICS_FILE,
    PLOTS,
    RECIPE_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    SUMMARY_FILE,
    TENSORBOARD,
    TRAINED_FILE,
    WANDB_FILE,
)
from sift_cli.system.files import write_text
from sift_cli.tasks.metrics import LOSS, shown

HELD_OUT = {LOSS: "held-out loss"}  # of the metrics, what else reads like a step's number
StepRecord = Mapping[str, Any]  # the numbers of a logged step by name, or its `metrics`


class Sink(Protocol):
    """Takes a record for each logged step, and one for each evaluation, which has `metrics`."""

    def log(self, record: StepRecord) -> None:
        """Takes the next record."""

    def close(self) -> None:
        """Ends the sink; called once, however the run ends."""


class JsonLines:
    """metrics.jsonl: one object per line, flushed as it comes.

    Of an earlier run's lines those up to step `after` stay.
    """

    def __init__(self, path: Path, after: int = 0) -> None:
        write_text(path, "".join(lines_until(path, after)) if after else "")
        self._file = path.open("a", encoding="utf-8")

    def log(self, record: StepRecord) -> None:
        """Writes one line; a number that is not finite becomes null."""
        plain = {key: value if _fits_json(value) else None for key, value in record.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Waits until every line is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Event files for TensorBoard under `folder`; earlier ones count up to step `after`."""

    def __init__(self, folder: Path, after: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise SiftError(_missing("tensorboard")) from None
        self._writer: Any = SummaryWriter(str(folder), purge_step=after + 1 if after else None)

    def log(self, record: StepRecord) -> None:
        """Adds every number of the record as a scalar."""
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flushes the event file."""
        self._writer.close()


class WandB:
    """A Weights & Biases run; one that is resumed after a step goes on under its old id.

    `note` is the file that keeps the id; wandb's own files go beside it.
    """

    def __init__(self, note: Path, config: Mapping[str, Any], after: int = 0) -> None:
        try:
            import wandb
        except ImportError:
            raise SiftError(_missing("wandb")) from None
        known = note.read_text(encoding="utf-8") if after and note.is_file() else None
        again = {"id": known, "resume": "allow"} if known else {}
        self._run = wandb.init(project="sift", dir=str(note.parent), config=dict(config), **again)
        write_text(note, str(self._run.id))

    def log(self, record: StepRecord) -> None:
        """Logs every number of the record."""
        self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class Bar:
    """A progress bar with loss, speed and time left; where no terminal is, ten plain lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=None, numbers="")
        self._tenths = 0  # of the steps that plain lines have told of
        self._progress.start()

    def log(self, record: StepRecord) -> None:
        """Moves the bar; an evaluation also stays on the screen as a line."""
        if "metrics" in record:
            found = "  ".join(
                f"{HELD_OUT.get(name, name)} {shown(x)}" for name, x in record["metrics"].items()
            )
            best = "  (best)" if record.get("best") else ""
            self._console.print(f"step {record['step']}: {found}{best}", highlight=False)
        else:
            step, steps = record["step"], record["steps"]
            of = "tokens" if "tokens_per_second" in record else "rows"
            speed = f"{record[f'{of}_per_second']:,.0f} {of}/s"
            numbers = f"loss {record['loss']:.4f}  {speed}"
            self._progress.update(self._task, completed=step, total=steps, numbers=numbers)
            if not self._console.is_terminal and 10 * step // steps > self._tenths:
                self._tenths = 10 * step // steps
                self._console.print(f"step {step} of {steps}: {numbers}", highlight=False)

    def close(self) -> None:
        """Takes the bar down."""
        self._progress.stop()


class Sinks:
    """metrics.jsonl and all other sinks of a run behind one `log`; `last` come after the file.

    Without `lines` and others it takes records and does nothing.
    """

    def __init__(
        self, lines: JsonLines | None, more: Sequence[Sink] = (), last: Sequence[Sink] = ()
    ) -> None:
        self._lines = lines
        self._sinks = [*more, *([lines] if lines else []), *last]

    def log(self, record: StepRecord) -> None:
        """Hands the record to every sink."""
        for sink in self._sinks:
            sink.log(record)

    def sync(self) -> None:
        """Waits until what metrics.jsonl holds is on the disk."""
        if self._lines:
            self._lines.sync()

    def close(self) -> None:
        """Closes every sink."""
        for sink in self._sinks:
            sink.close()


def open_sinks(
    recipe: Recipe,
    out: Path,
    console: Console,
    after: int = 0,
    callbacks: Sequence[Callback] = (),
    main: bool = True,
) -> Sinks:
    """Writes recipe.yaml and opens the sinks of a run that goes on after step `after`.

    What marks an earlier run as finished, and its weights, are removed. Of the processes of one run
    only the `main` one has sinks.
    """
    if not main:
        return Sinks(None)
    sinks: list[Sink] = []  # first: a package that is missing must not cost the earlier run
    if recipe.log.tensorboard:
        sinks.append(TensorBoard(out / TENSORBOARD, after))
    if recipe.log.wandb:
        sinks.append(WandB(out / WANDB_FILE, recipe.model_dump(mode="json"), after))
    for name in (SUMMARY_FILE, DELTA_FILE, TRAINED_FILE, REPORT_FILE):
        (out / name).unlink(missing_ok=True)
    if not after:
        for name in (GRADIENT_FILE, SAMPLES_FILE):
            (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / PLOTS, ignore_errors=True)
    write_text(out / RECIPE_FILE, recipe.to_yaml())
    lines = JsonLines(out / METRICS_FILE, after)
    return Sinks(lines, [*sinks, Bar(console)], [Called(one) for one in callbacks])


def _numbers(record: StepRecord) -> dict[str, float]:
    """Every number of a record but the step; those of an evaluation as metrics/NAME."""
    flat = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
    metrics = record.get("metrics", {}).items()
    return flat | {f"metrics/{name}": value for name, value in metrics if value is not None}


def logged(path: Path) -> Iterator[dict[str, Any]]:
    """The records in metrics.jsonl, in order; a line that a kill cut short is none of them."""
    for _, record in _records(path):
        yield record


def lines_until(path: Path, step: int) -> Iterator[str]:
    """The lines of steps up to `step`."""
    for line, record in _records(path):
        if record["step"] <= step:
            yield line + "\n"


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line that holds a record, and the record."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            int(record["step"])
            yield line, record


def _fits_json(value: object) -> bool:
    return not isinstance(value, float) or isfinite(value)


def _missing(name: str) -> str:
    return f"log.{name}: the package is not installed; `pip install 'sift-cli[{name}]'`"
