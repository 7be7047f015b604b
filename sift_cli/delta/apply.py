"""A delta on a model in memory, and the check that the model is the right one."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sift_cli.delta.file import Delta
from sift_cli.delta.identity import advice, differing
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import Kind, kinds_of, state_fingerprints, tied_names


def rest_fingerprints(marks: Mapping[str, str], touched: Iterable[str]) -> str:
    """Eight hex digits for each tensor that a delta leaves alone, in the order of sorted names."""
    left = sorted(set(marks) - set(touched))
    return "".join(marks[name][:8] for name in left)


def check_base(
    delta: Delta,
    marks: Mapping[str, str],
    source: str,
    merged: bool = False,
    *,
    kinds: Mapping[str, Kind] | None = None,
    tied: Mapping[str, str] | None = None,
) -> None:
    """Raises SiftError (exit code 3) naming the tensors in which `source` is not the delta's base.

    `marks` holds the fingerprint of each of the base's tensors, by name; `merged` says that
    `source` is the merged model, turned back. `kinds` and `tied`, where known, are what the source
    holds: they say more of what is wrong.
    """
    lacking, wrong = differing(delta, marks)
    if not lacking and not wrong:
        return
    names = lacking + wrong
    base = delta.about["base"]
    role = "the merged model" if merged else "the base"
    shown = "\n  ".join(names[:10])
    more = f"\n  and {len(names) - 10} more" if len(names) > 10 else ""
    raise SiftError(
        f"{source} is not {role} of this delta, which was trained on {base['path']} "
        f"({base['dtype']}); {len(names)} tensors {'are lacking or ' if lacking else ''}differ:\n"
        f"  {shown}{more}\n{advice(delta, marks, kinds or {}, tied or {}, names, merged)}",
        ExitCode.WRONG_FILE,
    )


@torch.no_grad()
def apply_delta(
    model: nn.Module,
    delta: Delta,
    source: str = "the model",
    kinds: Mapping[str, Kind] | None = None,
) -> None:
    """Turns the base into the trained model, in place and bit for bit.

    `kinds` are those of the files that `model` was loaded from, where it was loaded in another
    dtype. Raises SiftError (exit code 3) where `model` is not the base that the delta was trained
    on.
    """
    named: dict[str, Tensor] = dict(model.named_parameters())
    marks = state_fingerprints(model, delta.dense)
    check_base(delta, marks, source, kinds=kinds or kinds_of(model), tied=tied_names(model))
    for name, weight in delta.weights.items():
        weight.toggle_(named[name])
    for name, tensor in delta.dense.items():
        named[name].copy_(tensor)
