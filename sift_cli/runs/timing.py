"""What a run takes: time and memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Used:
    """Seconds and bytes that a run took so far, and the steps after which it was resumed."""

    wall_time_s: float
    peak_memory_bytes: int
    resumed_at: list[int]


class Timing:
    """Wall time of the run and of each step; a GPU's steps are timed by its own clock.

    A run that was resumed also counts what the processes before this one used.
    """

    def __init__(self) -> None:
        self.resumed_at: list[int] = []
        self._started = time.perf_counter()
        self._peak_memory = 0
        self._step_ms: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def step(self, device: torch.device) -> Iterator[None]:
        """Times a step on `device` without waiting for a GPU."""
        if device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
            return
        began = time.perf_counter()
        yield
        self._step_ms.append((time.perf_counter() - began) * 1e3)

    def used(self, device: torch.device) -> Used:
        """What the run took so far."""
        return Used(
            wall_time_s=time.perf_counter() - self._started,
            peak_memory_bytes=max(peak_memory(device), self._peak_memory),
            resumed_at=self.resumed_at,
        )

    def resume(self, step: int, step_ms: list[float], used: Used) -> None:
        """Counts on after `step` of an earlier process, with its step times and what it `used`."""
        self._started -= used.wall_time_s
        self._peak_memory = used.peak_memory_bytes
        self.resumed_at = [*used.resumed_at, step]
        self._step_ms = step_ms

    @property
    def step_ms(self) -> list[float]:
        """Milliseconds of every step so far; waits for the last of them."""
        if self._events:
            self._events[-1][1].synchronize()
            self._step_ms += [began.elapsed_time(ended) for began, ended in self._events]
            self._events.clear()
        return self._step_ms


def peak_memory(device: torch.device) -> int:
    """The most bytes allocated so far on a GPU; else the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
