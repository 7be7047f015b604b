"""A caller's own code, told of a run while it runs."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from sift_cli.errors import SiftError


@runtime_checkable
class Callback(Protocol):
    """What `train(callbacks=...)` takes.

    A record is the line that metrics.jsonl gets. What a callback raises ends the run, and is told
    with its name.
    """

    def on_step(self, record: Mapping[str, Any]) -> None:
        """After each logged step (`log.every`): `step`, `loss`, `learning_rate` and the like."""

    def on_evaluate(self, record: Mapping[str, Any]) -> None:
        """After each evaluation: `step`, `metrics` by name, and whether it is the `best`."""


def require_callbacks(callbacks: Sequence[object]) -> None:
    """Raises SiftError where one of them is no `Callback`."""
    for one in callbacks:
        if isinstance(one, type) or not isinstance(one, Callback):
            got = f"the class {one.__name__}" if isinstance(one, type) else type(one).__name__
            raise SiftError(
                f"callbacks: give objects with the methods on_step and on_evaluate, got {got}"
            )


class Called:
    """A callback as a sink of the run's numbers."""

    def __init__(self, callback: Callback) -> None:
        self._callback = callback

    def log(self, record: Mapping[str, Any]) -> None:
        """Hands the record on; an exception becomes a SiftError that names the callback."""
        of = "on_evaluate" if "metrics" in record else "on_step"
        try:
            getattr(self._callback, of)(record)
        except Exception as error:
            name = f"{type(self._callback).__qualname__}.{of}"
            raise SiftError(
                f"callbacks: {name} failed at step {record['step']:,}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def close(self) -> None:
        """Leaves the callback as it is."""
