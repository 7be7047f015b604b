"""Two models whose difference is a delta: opened together, and refused where there is none."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from sift_cli.errors import ExitCode, SiftError, in_lines
from sift_cli.models.fingerprints import dtype_name
from sift_cli.models.loading import (
    DTYPES,
    LoadedModel,
    load_model,
    model_folder,
    read_config,
)
from sift_cli.models.stored import Stored, stored_kinds
from sift_cli.tasks.kinds import task_of_tuned
from sift_cli.tasks.task import Task


@dataclass
class Pair:
    """The base in memory and the tuned model on disk, seen one tensor at a time.

    `loaded` is the base with the tuned model's kind of head, held in `dtype`; `base` are its
    parameters by name. `folder`, `config` and `task` are the tuned model's. `lossless` becomes
    False where a tuned value is rounded to the base's dtype.
    """

    loaded: LoadedModel
    tuned: Stored
    folder: Path
    config: PretrainedConfig
    task: Task
    dtype: str
    lossless: bool = True

    def __post_init__(self) -> None:
        self.base: dict[str, nn.Parameter] = dict(self.loaded.model.named_parameters())

    @property
    def new(self) -> tuple[str, ...]:
        """The parameters that the base lacks."""
        return self.loaded.new

    def __iter__(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, base and tuned values ([...], both in the base's dtype) of each shared weight."""
        for name, weight in self.base.items():
            if name not in self.new:
                yield name, weight.detach(), self.read(name)

    def read(self, name: str) -> Tensor:
        """The tuned tensor in the base's dtype."""
        stored = self.tuned.tensor(name)
        held = stored.to(self.base[name].dtype)
        if held.dtype != stored.dtype and not torch.equal(held.to(stored.dtype), stored):
            self.lossless = False
        if not bool(torch.isfinite(held).all()):
            raise SiftError(f"{name} is not finite in the tuned model", ExitCode.NOT_FINITE)
        return held


def open_pair(base: str, tuned: str, dtype: str | None) -> Pair:
    """Both models, held in `dtype` or else the one that both are stored in.

    Raises SiftError where no delta can turn the one into the other.
    """
    folder, tuned_folder = model_folder(base), model_folder(tuned)
    config = read_config(tuned_folder)
    task = task_of_tuned(config, tuned)
    held_in = dtype or _common_dtype(base, folder, tuned, tuned_folder)
    base_config = _base_config(folder, task, config, tuned)
    loaded = load_model(folder, task.auto, base_config, DTYPES[held_in], new_head=task.new_head)
    architecture = type(loaded.model).__name__
    if architecture not in (config.architectures or []):
        raise SiftError(f"{tuned} is {config.architectures}; the base becomes a {architecture}")
    stored = Stored(tuned_folder, loaded.model)
    pair = Pair(loaded, stored, tuned_folder, config, task, held_in)
    _check_tensors(pair, base, tuned)
    return pair


def _base_config(
    folder: Path, task: Task, tuned_config: PretrainedConfig, tuned: str
) -> PretrainedConfig:
    config = task.configure(folder)
    if config.model_type != tuned_config.model_type:
        raise SiftError(
            f"{tuned} is of the kind {tuned_config.model_type}, the base {config.model_type}: "
            "only two models of one architecture have a difference"
        )
    return config


def _common_dtype(base: str, folder: Path, tuned: str, tuned_folder: Path) -> str:
    """The one dtype that all tensors of both models have on disk; SiftError for several."""
    one, other = (
        {dtype_name(dtype) for dtype, _ in stored_kinds(place).values()}
        for place in (folder, tuned_folder)
    )
    if one == other and len(one) == 1 and one <= set(DTYPES):
        return one.pop()
    raise SiftError(
        f"{base} is stored in {' and '.join(sorted(one))}, {tuned} in "
        f"{' and '.join(sorted(other))}; name what both are to be held in: --dtype float32 keeps "
        "every value, and what rounding changed with it, --dtype bfloat16 rounds both first"
    )


def _check_tensors(pair: Pair, base: str, tuned: str) -> None:
    """Raises SiftError where the tuned model's tensors are not those of the base's architecture."""
    places = pair.tuned.places
    names = list(pair.base)
    lacking = [name for name in names if name not in places]
    if lacking:
        raise SiftError(f"{tuned} lacks {_listed(lacking)}")
    shapes = {name: tuple(pair.tuned.shape(name)) for name in names}
    other = [
        f"{name}: {list(pair.base[name].shape)} in the base, {list(shape)} in the tuned model"
        for name, shape in shapes.items()
        if shape != tuple(pair.base[name].shape)
    ]
    if other:
        hint = ""
        if any("embed" in one for one in other):
            hint = "\nA resized vocabulary has no base to differ from."
        raise SiftError(f"{tuned} has other shapes than {base}: {_listed(other)}{hint}")
    state = pair.loaded.model.state_dict()
    moved = [
        name
        for name in places
        if name not in pair.base
        and not torch.equal(pair.tuned.tensor(name).to(state[name].dtype), state[name])
    ]
    if moved:
        raise SiftError(
            f"{tuned} differs in what is no parameter, which no delta holds: {_listed(moved)}"
        )


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)}:\n  {in_lines(names)}"
