"""Devices: which one, what computes there in which precision, how a batch gets there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sift_cli.errors import SiftError


def autocast(device: torch.device, enabled: bool) -> AbstractContextManager[Any]:
    """bfloat16 autocast on `device`, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def place(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on `device`; for a GPU in a way that the host need not wait for.

    There, an attention mask that hides nothing is left out, since it is read here and now.
    """
    if device.type != "cuda":
        return {key: value.to(device) for key, value in batch.items()}
    return {
        key: value.pin_memory().to(device, non_blocking=True)
        for key, value in without_idle_mask(batch).items()
    }


def without_idle_mask(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch, without its attention mask where that hides nothing."""
    mask = batch.get("attention_mask")
    idle = mask is not None and bool(mask.all())
    return {key: value for key, value in batch.items() if not (idle and key == "attention_mask")}


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is: cuda, then mps, then cpu.

    Raises SiftError for a device that is not there.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name is None:
        return torch.device(next(kind for kind, ok in there.items() if ok))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SiftError(f"--device {name}: no such device; use cuda, mps or cpu") from None
    beyond = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if not there.get(device.type, False) or beyond:
        usable = ", ".join(kind for kind, ok in there.items() if ok)
        raise SiftError(f"--device {name}: not on this machine; there is {usable}")
    return device


def cores_here() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def require_devices(count: int, device: str | None) -> None:
    """Raises SiftError where this node has no device for each of so many processes."""
    kind = pick_device(device).type
    if kind == "mps":
        raise SiftError(f"--devices {count}: mps is one device; use --device cpu")
    if kind == "cuda" and device not in (None, "cuda"):
        raise SiftError(f"--devices {count}: each process has a GPU of its own; leave out {device}")
    if kind == "cuda" and count > torch.cuda.device_count():
        raise SiftError(
            f"--devices {count}: {torch.cuda.device_count()} GPUs are visible; give no more than "
            "these, or --device cpu"
        )


def ungraded(model: nn.Module) -> AbstractContextManager[Any]:
    """Nothing within is recorded for a backward pass.

    Inference mode, but where weights are gathered from several devices: into tensors that backward
    passes use as well, and these cannot be of inference mode.
    """
    gathered = hasattr(next(model.parameters()), "to_local")
    return torch.no_grad() if gathered else torch.inference_mode()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, and then as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
