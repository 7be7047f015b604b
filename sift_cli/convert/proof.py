"""What shows that a written folder is the right model: its files, its logits, its metrics."""

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sift_cli.errors import ExitCode, SiftError, counted
from sift_cli.models.fingerprints import fingerprint
from sift_cli.models.shards import places_in, weight_files
from sift_cli.models.tensors import list_file
from sift_cli.recipe import Recipe
from sift_cli.runs.session import open_session
from sift_cli.tasks.evaluation import probe
from sift_cli.tasks.kinds import load_as_it_is, task_of_config
from sift_cli.tasks.metrics import Metrics, shown

# For numbers from another machine or library version. On the same one they are equal, or differ in
# their last bits: torch's kernels add up in another order where a weight does not begin at a
# multiple of 16 bytes, which in memory mapped from a file depends on what stands before it.
LOGITS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
METRIC_TOLERANCE = 0.01


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor as it was written: its fingerprint in the dtype `held`, not in the file's."""

    fingerprint: str
    held: torch.dtype


@dataclass(frozen=True)
class Proof:
    """What was compared (`verified`: files, logits, metrics), and what came out.

    `logits` are those of the folder's model ([4, outputs]), `logits_difference` how far they are
    from the trained model's. `metrics` is what the folder scores, `metrics_trained` what its one
    delta scored after training. None stands for what was not asked for or has no counterpart.
    """

    verified: list[str] = field(default_factory=list)
    logits: Tensor | None = None
    logits_difference: float | None = None
    metrics: Metrics | None = None
    metrics_trained: Metrics | None = None

    def to_json(self) -> dict[str, Any]:
        """The keys of `sift merge --json` about it; what was not asked for has none."""
        values: dict[str, Any] = {"verified": self.verified}
        if self.logits_difference is not None:
            values["logits_difference"] = self.logits_difference
        if self.metrics is not None:
            values |= {"metrics": self.metrics, "metrics_trained": self.metrics_trained}
        return values


def prove_files(folder: Path, wanted: Mapping[str, WrittenTensor]) -> None:
    """Reads every tensor back from disk and compares its fingerprint with the `wanted` one.

    Raises SiftError (exit code 5) where a tensor is another one, is not there, or is too many.
    """
    places = places_in(folder)
    unmatched = sorted(places.keys() ^ wanted.keys())
    wrong = unmatched or [
        key
        for key, tensor in wanted.items()
        if fingerprint(places[key].read().to(tensor.held)) != tensor.fingerprint
    ]
    if wrong:
        raise SiftError(
            f"{folder}: read back from disk, "
            f"{counted(len(wrong), 'tensor is', 'tensors are')} not as written, such as "
            f"{wrong[0]}; the disk or the memory is faulty",
            ExitCode.NOT_VERIFIED,
        )


def reloaded_logits(folder: Path) -> Tensor:
    """The outputs of four made-up inputs ([4, ...]) by the folder's model.

    The weights stay on disk: each module reads its own as it computes.
    """
    loaded = load_as_it_is(folder)
    config = loaded.model.config
    with _weights_on_disk(loaded.model, folder):
        return probe(task_of_config(config), loaded.model, config)


@contextmanager
def _weights_on_disk(model: nn.Module, folder: Path) -> Iterator[None]:
    """Maps a model's weights from its files while inside, so that few are in memory at a time.

    Once a module has computed, the pages that its weights were read into are let go.
    """
    named = dict(model.named_parameters())
    maps = []
    for file in weight_files(folder):
        with file.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        maps.append(mapped)
        for key, place in list_file(file).places.items():
            weight = named.get(key)
            if weight is None or not weight.numel() or place.start % place.dtype.itemsize:
                continue
            if (weight.dtype, tuple(weight.shape)) == (place.dtype, place.shape):
                flat = torch.frombuffer(
                    mapped, dtype=place.dtype, count=prod(place.shape), offset=place.start
                )
                weight.data = flat.view(place.shape)

    def forget(*_: Any) -> None:
        for mapped in maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    hooks = []
    if hasattr(mmap, "MADV_DONTNEED"):
        hooks = [one.register_forward_hook(forget) for one in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def prove_logits(logits: Tensor, trained: Tensor, dtype: str) -> float:
    """The largest difference of two models' logits.

    Raises SiftError (exit code 5) where it is more than another machine or version would make.
    """
    difference = (
        float((logits - trained).abs().max()) if logits.shape == trained.shape else float("nan")
    )
    if not difference <= LOGITS_TOLERANCE[dtype] * max(1.0, float(trained.abs().max())):
        raise SiftError(
            f"the merged model's logits differ from the trained model's by up to {difference:.3g}",
            ExitCode.NOT_VERIFIED,
        )
    return difference


def score(folder: Path, recipe: Recipe) -> Metrics:
    """The metrics of the folder's model on the evaluation split of the recipe's data.

    Those that are code are left out: a delta by other hands may name any.
    """
    session = open_session(recipe.without_code(), train=False, tuned=load_as_it_is(folder))
    return session.evaluate()


def prove_metrics(metrics: Metrics, trained: Metrics) -> None:
    """Raises SiftError (exit code 5) where a metric is not the one measured after training."""
    for name, value in trained.items():
        again = metrics.get(name, value)
        if again is None or value is None:
            same = again == value
        else:
            same = abs(again - value) <= METRIC_TOLERANCE * max(1, abs(value))
        if not same:
            raise SiftError(
                f"the merged model's {name} is {shown(again)}, and {shown(value)} after training",
                ExitCode.NOT_VERIFIED,
            )
