"""What shows that a written folder is the right model: its files, its logits, its metrics."""

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import fingerprint
from sift_cli.models.loading import LoadedModel, weight_files
from sift_cli.models.tensors import list_file
from sift_cli.recipe import Recipe
from sift_cli.runs.session import open_session
from sift_cli.tasks.classification import load_as_it_is, task_of_config
from sift_cli.tasks.evaluation import probe
from sift_cli.tasks.metrics import Metrics, shown

# For numbers from another machine or library version; on the same one they are equal.
LOGITS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
METRIC_TOLERANCE = 0.01


def prove_files(folder: Path, wanted: Mapping[str, tuple[str, torch.dtype]]) -> None:
    """Reads every tensor back from disk; `wanted` has its fingerprint when held in that dtype.

    Raises SiftError (exit code 5) where a tensor is another one, is not there, or is too many.
    """
    places = {key: p for file in weight_files(folder) for key, p in list_file(file).places.items()}
    odd = sorted(places.keys() ^ wanted.keys())
    wrong = odd or [
        key
        for key, (mark, held) in wanted.items()
        if fingerprint(places[key].read().to(held)) != mark
    ]
    if wrong:
        raise SiftError(
            f"{folder}: read back from disk, {len(wrong)} tensors are not as written, such as "
            f"{wrong[0]}; the disk or the memory is faulty",
            ExitCode.NOT_VERIFIED,
        )


def reload(folder: Path) -> LoadedModel:
    """The folder's model through transformers; SiftError (exit code 5) where it lacks a tensor."""
    loaded = load_as_it_is(folder)
    if loaded.new:
        raise SiftError(f"{folder} lacks {loaded.new[0]}", ExitCode.NOT_VERIFIED)
    return loaded


def reloaded_logits(folder: Path) -> Tensor:
    """The outputs of four made-up inputs ([4, ...]) by the folder's model.

    The weights stay on disk: each module reads its own as it computes.
    """
    loaded = reload(folder)
    config = loaded.model.config
    with _weights_on_disk(loaded.model, folder):
        return probe(task_of_config(config), loaded.model, config)


@contextmanager
def _weights_on_disk(model: nn.Module, folder: Path) -> Iterator[None]:
    """Lets go of the pages that a module's weights were read into once the module has computed."""
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


def prove_logits(found: Tensor, wanted: Tensor, dtype: str) -> float:
    """The largest difference; SiftError (exit code 5) where it is more than another machine's."""
    difference = (
        float((found - wanted).abs().max()) if found.shape == wanted.shape else float("nan")
    )
    if not difference <= LOGITS_TOLERANCE[dtype] * max(1.0, float(wanted.abs().max())):
        raise SiftError(
            f"the merged model's logits differ from the trained model's by up to {difference:.3g}",
            ExitCode.NOT_VERIFIED,
        )
    return difference


def score(folder: Path, recipe: Recipe) -> Metrics:
    """The metrics of the folder's model on the evaluation split of the recipe's data."""
    return open_session(recipe, train=False, tuned=reload(folder)).evaluate()


def prove_metrics(found: Metrics, wanted: Metrics) -> None:
    """Raises SiftError (exit code 5) where a metric is not the one measured after training."""
    for name, value in wanted.items():
        again = found.get(name, value)
        if again is None or value is None:
            same = again == value
        else:
            same = abs(again - value) <= METRIC_TOLERANCE * max(1, abs(value))
        if not same:
            raise SiftError(
                f"the merged model's {name} is {shown(again)}, and {shown(value)} after training",
                ExitCode.NOT_VERIFIED,
            )
