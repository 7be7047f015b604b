"""SIGINT and SIGTERM as a request that a run hears between steps."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def hears(number: signal.Signals) -> bool:
    """Whether a handler that is set now, in this thread, would be called.

    A signal that the process was started deaf to, as jobs in the background are to SIGINT, stays
    unheard, and signals arrive in the main thread alone.
    """
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(number) not in (signal.SIG_IGN, None)


class Stop:
    """Within it, the first of SIGNALS sets `asked` and gives the handlers from before back, so that
    a second one acts at once.

    A signal that the process does not hear (`hears`) is left alone.
    """

    def __init__(self) -> None:
        self.asked = False
        self._breaks = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        for one in filter(hears, SIGNALS):
            self._before[one] = signal.signal(one, self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back()

    def interruptible(self, work: Callable[[], Result]) -> Result | None:
        """What `work` returns; None where a signal came before its end, and broke it off."""
        try:
            self._breaks = True
            result = None if self.asked else work()
            self._breaks = False
            return result
        except _AskedError:
            return None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._give_back()
        if self._breaks:
            self._breaks = False
            raise _AskedError

    def _give_back(self) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before.clear()


class _AskedError(BaseException):
    """Breaks work off; no Exception, so that no `except Exception` on the way swallows it."""
