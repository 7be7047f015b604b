"""A delta on a model in memory, and the check that the model is the right one."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sift_cli.delta.file import Delta, fingerprint
from sift_cli.errors import ExitCode, SiftError


def rest_fingerprints(marks: Mapping[str, str], touched: Iterable[str]) -> str:
    """Eight hex digits for each tensor that a delta leaves alone, in the order of sorted names."""
    left = sorted(set(marks) - set(touched))
    return "".join(marks[name][:8] for name in left)


def state_fingerprints(model: nn.Module, skip: Iterable[str]) -> dict[str, str]:
    """The fingerprint of every parameter and saved buffer of `model` but those in `skip`.

    Tied weights count once, under the first of their names.
    """
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    left_out = tied | set(skip)
    state = model.state_dict(keep_vars=True)
    return {name: fingerprint(one) for name, one in state.items() if name not in left_out}


def check_base(delta: Delta, marks: Mapping[str, str], source: str, merged: bool = False) -> None:
    """Raises SiftError (exit code 3) naming the tensors in which `source` is not the delta's base.

    `marks` holds the fingerprint of each of the base's tensors, by name; `merged` says that
    `source` is the merged model, turned back.
    """
    untouched = sorted(set(marks) - set(delta.weights))
    wanted = {name: weight.base for name, weight in delta.weights.items()}
    wanted |= {name: delta.rest[8 * at : 8 * at + 8] for at, name in enumerate(untouched)}
    lacking = [name for name in delta.weights if name not in marks]
    if lacking or len(delta.rest) != 8 * len(untouched):
        raise _refusal(source, delta, lacking or ["another set of tensors"], merged)
    wrong = [name for name, mark in wanted.items() if not marks[name].startswith(mark)]
    if wrong:
        raise _refusal(source, delta, sorted(wrong), merged)


def _refusal(source: str, delta: Delta, names: list[str], merged: bool) -> SiftError:
    more = f"\n  and {len(names) - 10} more" if len(names) > 10 else ""
    base = delta.about["base"]
    role = "the merged model" if merged else "the base"
    shown = "\n  ".join(names[:10])
    return SiftError(
        f"{source} is not {role} of this delta, which was trained on {base['path']} "
        f"({base['dtype']}); {len(names)} tensors differ:\n  {shown}{more}",
        ExitCode.WRONG_FILE,
    )


@torch.no_grad()
def apply_delta(model: nn.Module, delta: Delta, source: str = "the model") -> None:
    """Turns the base into the trained model, in place and bit for bit.

    Raises SiftError (exit code 3) where `model` is not the base that the delta was trained on.
    """
    named: dict[str, Tensor] = dict(model.named_parameters())
    check_base(delta, state_fingerprints(model, delta.dense), source)
    for name, weight in delta.weights.items():
        weight.toggle_(named[name])
    for name, tensor in delta.dense.items():
        named[name].copy_(tensor)
