"""A delta as an adapter folder that PEFT loads: its SHiRA layout, written without PEFT."""

import json
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sift_cli.delta.file import Delta, load_delta
from sift_cli.delta.serving import apply_delta
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.loading import DTYPES, LoadedModel, load_model, model_folder
from sift_cli.runs.folder import CARD_FILE
from sift_cli.sparse import Support
from sift_cli.system.files import new_folder
from sift_cli.tasks.classification import task_of_labels
from sift_cli.tasks.evaluation import probe
from sift_cli.tasks.task import Task

PREFIX = "base_model.model."
# Of logits whose weights PEFT adds up in another order than training did.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
LISTED = 10  # names in a message


def export(
    delta_path: Path,
    out: Path,
    *,
    base: str | None = None,
    whole: bool = False,
    partial: bool = False,
    verify: bool = True,
) -> dict[str, Any]:
    """Writes an adapter folder for `PeftModel.from_pretrained`; says what it holds and how well.

    Weights of linear layers become SHiRA entries, heads and norms are stored whole, biases of
    linear layers as values that replace the base's. Other modules are stored whole with `whole`,
    left out with `partial`. `verify` loads the folder with PEFT, where that is installed, and
    compares logits with the trained model's. Nothing is left in `out` unless all succeeds.

    Raises SiftError: exit code 2 for what the layout does not hold or where `out` exists, 3 for a
    damaged delta or a wrong base, 5 where the loaded adapter's logits differ.
    """
    delta = load_delta(delta_path)
    if out.exists():
        raise SiftError(f"{out} exists already; choose another --out or remove it")
    source = base or delta.about["base"]["path"]
    task = task_of_labels(delta.about["labels"])
    load = _loader(task, delta, base, source)
    model = load().model
    apply_delta(model, delta, source)
    plan = make_plan(model, delta, task.published.peft_heads, whole)
    if plan.refused and not partial:
        raise _refusal(plan.refused)
    tensors, inexact = _tensors(model, delta, plan)
    with new_folder(out) as aside:
        weights = aside / "adapter_model.safetensors"
        save_file(tensors, weights, metadata={"format": "pt"})
        weights.chmod(0o644)  # safetensors makes files private
        config = _config(plan, source, task.published.peft_type, delta)
        (aside / "adapter_config.json").write_text(config, encoding="utf-8")
        report = {
            "out": str(out),
            "base": source,
            "rank": plan.rank,
            "layers": len(plan.shira),
            "entries": sum(len(support) for support in plan.shira.values()),
            "whole": plan.whole,
            "compound": [one for one in plan.whole if any(model.get_submodule(one).children())],
            "biases": plan.biases,
            "left_out": plan.refused,
            "inexact": inexact,
            "bytes": weights.stat().st_size,
        }
        (aside / CARD_FILE).write_text(_card(report, task, delta), encoding="utf-8")
        del model
        report["logits_difference"] = None
        if verify and find_spec("peft") is not None:
            report["logits_difference"] = _verify(aside, load(), task, delta, bool(plan.refused))
    return report


def _loader(task: Task, delta: Delta, base: str | None, source: str) -> Callable[[], LoadedModel]:
    about = delta.about["base"]
    folder = model_folder(source, None if base else about["revision"])
    config = task.configure(folder)
    return lambda: load_model(folder, task.auto, config, DTYPES[about["dtype"]])


@dataclass
class Plan:
    """Where each change goes.

    `shira` has the support of each linear layer's weight by the layer's name, and `rank` PEFT's r:
    each of these layers gets r * (inputs + outputs) entries. `whole` names the modules that are
    stored whole, `biases` the parameters whose values replace the base's, `refused` what the layout
    does not hold, with the reason.
    """

    rank: int = 1
    shira: dict[str, Support] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def make_plan(model: nn.Module, delta: Delta, heads: tuple[str, ...], whole: bool) -> Plan:
    """Sorts every changed tensor into what PEFT's SHiRA layout has for it.

    PEFT stores modules whose names end with one of `heads` whole, asked or not.
    """
    modules = dict(model.named_modules())
    saved = {_module(name) for name in delta.dense}
    saved |= {name for name in modules if name.endswith(heads)}
    saved = _with_suffixes(saved, modules)
    plan = Plan()
    tied = _tied(model)
    linear: dict[str, Support] = {}
    for name, weight in delta.weights.items():
        owner = _module(name)
        module = modules[owner]
        if _inside(owner, saved):
            continue
        if name in tied:
            plan.refused[name] = "tied to another tensor"
        elif type(module) is nn.Linear and name.endswith(".weight"):
            linear[owner] = weight.support
        elif type(module) is nn.Linear:
            plan.biases.append(name)
        elif any(True for _ in module.children()):
            plan.refused[name] = f"part of {type(module).__name__}, which has other parts"
        elif whole or all(one.dim() < 2 for one in module.parameters()):
            saved.add(owner)
        else:
            plan.refused[name] = f"{type(module).__name__}, no linear layer"
    plan.rank, fitting = choose_rank(linear)
    for owner in linear.keys() - fitting:
        if whole:
            saved.add(owner)
        else:
            plan.refused[f"{owner}.weight"] = "more changed entries than one r for all layers holds"
    saved = _with_suffixes(saved, modules)
    plan.shira = {name: linear[name] for name in linear if name in fitting - saved}
    plan.biases = [name for name in plan.biases if not _inside(_module(name), saved)]
    plan.whole = sorted(name for name in saved if not _inside(name, saved - {name}))
    if not plan.shira:
        raise SiftError(
            "none of the delta's weights is one of a linear layer that PEFT's SHiRA holds "
            f"(layers such as {next(iter(plan.refused), 'the head')}); sift merge writes the "
            "whole model"
        )
    return plan


def choose_rank(linear: Mapping[str, Support]) -> tuple[int, set[str]]:
    """The one r for all layers that holds most of them in the least space, and which it holds.

    SHiRA gives a weight of m x n exactly r * (m + n) entries, at most m * n: a layer fits where its
    changed entries are no more than that; it is filled up with entries of no change.
    """
    lowest = {name: -(-len(s) // sum(s.shape)) for name, s in linear.items()}
    highest = {name: s.size // sum(s.shape) for name, s in linear.items()}

    def fitting(rank: int) -> set[str]:
        return {name for name in linear if lowest[name] <= rank <= highest[name]}

    def merit(rank: int) -> tuple[int, int]:
        return len(fitting(rank)), -rank

    best = max({*lowest.values()} or {1}, key=merit)
    return best, fitting(best)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _inside(name: str, saved: Collection[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in saved)


def _with_suffixes(saved: Collection[str], modules: Collection[str]) -> set[str]:
    """The modules that PEFT saves whole when asked for `saved`: it compares ends of names."""
    return {name for name in modules if name and name.endswith(tuple(saved))}


def _tied(model: nn.Module) -> set[str]:
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _refusal(refused: Mapping[str, str]) -> SiftError:
    lines = [f"{name}: {why}" for name, why in refused.items()]
    more = f"\n  and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
    shown = "\n  ".join(lines[:LISTED])
    return SiftError(
        f"PEFT's SHiRA layout does not hold {len(lines)} of the delta's tensors:\n  {shown}{more}\n"
        "--whole stores their modules whole where it can, --partial leaves them out (the adapter "
        "is then another model)"
    )


@torch.no_grad()
def _tensors(
    model: PreTrainedModel, delta: Delta, plan: Plan
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The adapter's tensors, and how far PEFT's sum misses the weights of `model`, the trained."""
    named = dict(model.named_parameters())
    tensors, missed, largest = {}, 0, 0.0
    for name, support in plan.shira.items():
        trained = named[f"{name}.weight"].detach()
        base = trained.clone()
        delta.weights[f"{name}.weight"].toggle_(base)
        indices, values = shira_entries(support, base, trained, plan.rank)
        tensors[f"{PREFIX}{name}.shira_weight"] = values
        tensors[f"{PREFIX}{name}.shira_indices"] = indices
        base += torch.sparse_coo_tensor(indices, values, base.shape, check_invariants=True)
        missed += int((base != trained).sum())
        largest = max(largest, float((base.float() - trained.float()).abs().max()))
    state = model.state_dict()
    for name in plan.whole:
        for key, value in state.items():
            if key.startswith(f"{name}."):
                tensors[PREFIX + key] = value.contiguous()
    for name in plan.biases:
        wrapped = f"{_module(name)}.base_layer" if _module(name) in plan.shira else _module(name)
        tensors[f"{PREFIX}{wrapped}.bias"] = named[name].detach()
    return tensors, {"entries": missed, "largest": largest}


def shira_entries(
    support: Support, base: Tensor, trained: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Row and column ([2, K], int32) and change ([K], fp32) of rank * (m + n) entries, in order.

    The first entries outside the support fill up what it has less; their change is 0.
    """
    count = rank * sum(support.shape)
    taken = torch.zeros(support.size, dtype=torch.bool)
    taken[slice(None) if support.positions is None else support.positions.long()] = True
    spare = (~taken).nonzero().flatten()[: count - len(support)]
    taken[spare] = True
    flat = taken.nonzero().flatten()
    change = trained.reshape(-1)[flat].float() - base.reshape(-1)[flat].float()
    width = support.shape[1]
    return torch.stack([flat // width, flat % width]).to(torch.int32), change


def _config(plan: Plan, source: str, task_type: str, delta: Delta) -> str:
    config = {
        "peft_type": "SHIRA",
        "task_type": task_type,
        "base_model_name_or_path": source,
        "revision": delta.about["base"]["revision"],
        "inference_mode": True,
        "r": plan.rank,
        "mask_type": "random",  # made and then replaced by the indices of the file
        "random_seed": 0,
        "target_modules": list(plan.shira),
        "modules_to_save": plan.whole,
        "fan_in_fan_out": False,
        "init_weights": True,
    }
    return json.dumps(config, indent=2) + "\n"


def _card(report: Mapping[str, Any], task: Task, delta: Delta) -> str:
    auto, dtype = task.auto.__name__, delta.about["base"]["dtype"]
    notes = "\n".join(f"- {line}" for line in describe(report))
    return f"""# A sift delta as a PEFT adapter

```python
import torch
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained(
    {report["base"]!r}, {task.published.arguments}, dtype=torch.{dtype}
)
model = PeftModel.from_pretrained(base, "this folder")
```

{notes}
"""


def describe(report: Mapping[str, Any]) -> list[str]:
    """What an adapter holds and how it differs from its delta, in sentences."""
    lines = [
        f"{report['layers']} linear layers with {report['entries']:,} changed entries as SHiRA "
        f"of r = {report['rank']} (zeros fill up), float32 differences."
    ]
    if report["whole"]:
        lines.append(f"Stored whole: {_few(report['whole'])}.")
    if report["compound"]:
        lines.append(
            f"{_few(report['compound'])} has several layers, on which PEFT's merge_and_unload "
            "fails for SHiRA (seen in 0.21.2): use the adapter unmerged, or sift merge."
        )
    if report["biases"]:
        lines.append(
            f"{len(report['biases'])} biases replace the base model's own: they stay when the "
            "adapter is disabled or another one is loaded."
        )
    missed = report["inexact"]
    if missed["entries"]:
        lines.append(
            f"Base + difference is rounded: {missed['entries']:,} entries miss the trained value, "
            f"by at most {missed['largest']:.2g}."
        )
    else:
        lines.append("Base + difference gives every trained weight exactly.")
    if report["left_out"]:
        lines.append(f"Left out, so that the model is another one: {_few(report['left_out'])}.")
    return lines


def _few(names: Collection[str]) -> str:
    shown = list(names)[:LISTED]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(shown) + more


def _verify(folder: Path, loaded: LoadedModel, task: Task, delta: Delta, partial: bool) -> float:
    """How far the logits of base + adapter are from the trained model's, loaded with PEFT."""
    from peft import PeftModel

    config = loaded.model.config
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse invariant checks")
        adapted = PeftModel.from_pretrained(loaded.model, str(folder))
        again = probe(task, adapted, config)
    trained = torch.tensor(delta.about["logits"])
    difference = float((again - trained).abs().max())
    limit = TOLERANCE[delta.about["base"]["dtype"]] * max(1.0, float(trained.abs().max()))
    if not difference <= limit and not partial:
        raise SiftError(
            f"with the adapter, logits differ from the trained model's by up to {difference:.3g}",
            ExitCode.NOT_VERIFIED,
        )
    return difference
