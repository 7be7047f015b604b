"""Where the numbers of a run go while it runs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sift_cli.errors import SiftError
from sift_cli.metrics import shown

Record = Mapping[str, Any]


class Sink(Protocol):
    """Takes one record per logged step; `metrics` in a record are those of an evaluation."""

    def log(self, record: Record) -> None:
        """Takes one record."""

    def close(self) -> None:
        """Called once, however the run ends."""


class JsonLines:
    """metrics.jsonl: one object per line, flushed as it comes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def log(self, record: Record) -> None:
        """Writes one line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Event files for TensorBoard under `folder`."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise SiftError(_missing("tensorboard")) from None
        self._writer: Any = SummaryWriter(str(folder))

    def log(self, record: Record) -> None:
        """Adds every number of the record as a scalar."""
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flushes the event file."""
        self._writer.close()


class WandB:
    """A Weights & Biases run."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise SiftError(_missing("wandb")) from None
        self._run = wandb.init(project="sift", dir=str(folder), config=dict(config))

    def log(self, record: Record) -> None:
        """Logs every number of the record."""
        self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class Bar:
    """A progress bar with loss, metric, speed and time left; plain lines where no one watches."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=None, said="")
        self._metric = ""
        self._tenths = 0  # of the steps that plain lines have told of
        self._progress.start()

    def log(self, record: Record) -> None:
        """Moves the bar; an evaluation also stays on the screen as a line."""
        if "metrics" in record:
            self._metric = "  ".join(f"{name} {shown(x)}" for name, x in record["metrics"].items())
            best = "  (best)" if record.get("best") else ""
            self._console.print(f"step {record['step']}: {self._metric}{best}", highlight=False)
        else:
            step, steps = record["step"], record["steps"]
            speed = f"{record['rows_per_second']:.0f} rows/s"
            said = "  ".join(filter(None, [f"loss {record['loss']:.4f}", self._metric, speed]))
            self._progress.update(self._task, completed=step, total=steps, said=said)
            if not self._console.is_terminal and 10 * step // steps > self._tenths:
                self._tenths = 10 * step // steps
                self._console.print(f"step {step} of {steps}: {said}", highlight=False)

    def close(self) -> None:
        """Takes the bar down."""
        self._progress.stop()


class Sinks:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def log(self, record: Record) -> None:
        """Hands the record to each."""
        for sink in self._sinks:
            sink.log(record)

    def close(self) -> None:
        """Closes each."""
        for sink in self._sinks:
            sink.close()


def _numbers(record: Record) -> dict[str, float]:
    flat = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
    return flat | {f"metrics/{k}": v for k, v in record.get("metrics", {}).items()}


def _missing(name: str) -> str:
    return f"log.{name}: the package is not installed; `pip install 'sift-cli[{name}]'`"
