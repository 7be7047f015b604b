"""The random states of a run."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_states(device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The states of every generator that a run may draw from, as JSON and as tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    generators = {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}
    states = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random/cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["random/mps"] = torch.mps.get_rng_state()
    return generators, states


def packed_states(
    each: Sequence[tuple[dict[str, Any], dict[str, Tensor]]],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `random_states` gave on every rank, in one: that of rank 0, and the others beside it."""
    generators, states = dict(each[0][0]), dict(each[0][1])
    if len(each) > 1:
        generators["others"] = [own for own, _ in each[1:]]
    for rank, (_, own) in enumerate(each[1:], 1):
        states |= {f"{key}/{rank}": state for key, state in own.items()}
    return generators, states


def states_of(
    rank: int, generators: Mapping[str, Any], states: Mapping[str, Tensor]
) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """Those of one rank; of one that was not there, those of rank 0."""
    others = generators.get("others", [])
    if not 0 < rank <= len(others):
        return generators, states
    end = f"/{rank}"
    own = {key.removesuffix(end): one for key, one in states.items() if key.endswith(end)}
    return others[rank - 1], own


def set_random_states(
    generators: Mapping[str, Any], states: Mapping[str, Tensor], device: torch.device
) -> None:
    """Sets every generator to where `random_states` found it."""
    version, words, gauss = generators["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = generators["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["random/cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["random/cuda"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states["random/mps"])


def kept_randomness(device: torch.device) -> Any:
    """Leaves the random states of the host and of `device` as they were."""
    devices = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices)
