"""A delta as an adapter folder that PEFT loads: its SHiRA layout, written without PEFT."""

import json
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from sift_cli.convert.adapter import Adapter, module_of, shira_entries, sort_changes
from sift_cli.delta.file import Delta, load_delta
from sift_cli.delta.serving import apply_delta
from sift_cli.errors import LISTED, ExitCode, SiftError, in_lines
from sift_cli.models.loading import DTYPES, LoadedModel, load_model, model_folder
from sift_cli.runs.folder import CARD_FILE
from sift_cli.system.files import new_folder
from sift_cli.tasks.evaluation import probe
from sift_cli.tasks.kinds import task_of
from sift_cli.tasks.task import Task

PREFIX = "base_model.model."
# Of logits whose weights PEFT adds up in another order than training did.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Missed:
    """Where base + difference is rounded: entries that miss the trained value, and by how much."""

    entries: int
    largest: float


@dataclass(frozen=True)
class Exported:
    """What an adapter folder holds, and how well it stands for its delta.

    `layers` and `entries` count what is SHiRA of r = `rank`; `whole`, `biases` and `left_out` are
    those of `Adapter`, `compound` the modules of `whole` that have several layers.
    `logits_difference` is None where the folder was not loaded.
    """

    out: str
    base: str
    rank: int
    layers: int
    entries: int
    whole: list[str]
    compound: list[str]
    biases: list[str]
    left_out: dict[str, str]
    inexact: Missed
    bytes: int
    logits_difference: float | None = None

    def to_json(self) -> dict[str, Any]:
        """What `sift export --json` prints."""
        return asdict(self)

    def sentences(self) -> list[str]:
        """What the adapter holds and how it differs from its delta."""
        lines = [
            f"{self.layers} linear layers with {self.entries:,} changed entries as SHiRA "
            f"of r = {self.rank} (zeros fill up), float32 differences."
        ]
        if self.whole:
            lines.append(f"Stored whole: {_few(self.whole)}.")
        if self.compound:
            lines.append(
                f"{_few(self.compound)} has several layers, on which PEFT's merge_and_unload "
                "fails for SHiRA (seen in 0.21.2): use the adapter unmerged, or sift merge."
            )
        if self.biases:
            lines.append(
                f"{len(self.biases)} biases replace the base model's own: they stay when the "
                "adapter is disabled or another one is loaded."
            )
        if self.inexact.entries:
            lines.append(
                f"Base + difference is rounded: {self.inexact.entries:,} entries miss the trained "
                f"value, by at most {self.inexact.largest:.2g}."
            )
        else:
            lines.append("Base + difference gives every trained weight exactly.")
        if self.left_out:
            lines.append(f"Left out, so that the model is another one: {_few(self.left_out)}.")
        return lines


def export(
    delta_path: Path,
    out: Path,
    *,
    base: str | None = None,
    whole: bool = False,
    partial: bool = False,
    verify: bool = True,
) -> Exported:
    """Writes an adapter folder for `PeftModel.from_pretrained`; says what it holds and how well.

    Weights of linear layers become SHiRA entries, biases of linear layers values that replace the
    base's; of heads and norms all parameters are stored. Other modules are stored so with `whole`,
    left out with `partial`. `verify` loads the folder with PEFT, where that is installed, and
    compares logits with the trained model's. Nothing is left in `out` unless all succeeds.

    Raises SiftError: exit code 2 for what the layout does not hold or where `out` exists, 3 for a
    damaged delta or a wrong base, 5 where the loaded adapter's logits differ.
    """
    delta = load_delta(delta_path)
    if out.exists():
        raise SiftError(f"{out} exists already; choose another --out or remove it")
    source = base or delta.header.base.path
    task = task_of(delta.header)
    load = _loader(task, delta, base, source)
    model = load().model
    apply_delta(model, delta, source)
    adapter = sort_changes(model, delta, task.published.peft_heads, whole)
    if adapter.refused and not partial:
        raise _refusal(adapter.refused)
    with new_folder(out) as folder:
        exported = _write(folder, str(out), source, model, task, delta, adapter)
        del model  # before the second one is loaded
        if verify and find_spec("peft") is not None:
            difference = _verify(folder, load(), task, delta, bool(adapter.refused))
            exported = replace(exported, logits_difference=difference)
    return exported


def _loader(task: Task, delta: Delta, base: str | None, source: str) -> Callable[[], LoadedModel]:
    """A function that loads the base, each time into a model of its own."""
    header = delta.header
    folder = model_folder(source, None if base else header.base.revision)
    config = task.configure(folder)
    dtype, new_head = DTYPES[header.base.dtype], bool(delta.dense)
    return lambda: load_model(folder, task.auto, config, dtype, new_head=new_head)


def _refusal(refused: Mapping[str, str]) -> SiftError:
    lines = [f"{name}: {why}" for name, why in refused.items()]
    return SiftError(
        f"PEFT's SHiRA layout does not hold {len(lines)} of the delta's tensors:\n"
        f"  {in_lines(lines)}\n"
        "--whole stores their modules whole where it can, --partial leaves them out (the adapter "
        "is then another model)"
    )


def _write(
    folder: Path,
    out: str,
    source: str,
    model: PreTrainedModel,
    task: Task,
    delta: Delta,
    adapter: Adapter,
) -> Exported:
    """Writes weights, configuration and card of the adapter; `model` is the trained model."""
    tensors, missed = _tensors(model, delta, adapter)
    weights = folder / "adapter_model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes files private
    config = _config(adapter, source, task.published.peft_type, delta)
    (folder / "adapter_config.json").write_text(config, encoding="utf-8")
    exported = Exported(
        out=out,
        base=source,
        rank=adapter.rank,
        layers=len(adapter.shira),
        entries=sum(len(support) for support in adapter.shira.values()),
        whole=adapter.whole,
        compound=[name for name in adapter.whole if any(model.get_submodule(name).children())],
        biases=adapter.biases,
        left_out=adapter.refused,
        inexact=missed,
        bytes=weights.stat().st_size,
    )
    (folder / CARD_FILE).write_text(_card(exported, task, delta), encoding="utf-8")
    return exported


@torch.no_grad()
def _tensors(
    model: PreTrainedModel, delta: Delta, adapter: Adapter
) -> tuple[dict[str, Tensor], Missed]:
    """The adapter's tensors, and how far PEFT's sum misses the weights of `model`, the trained."""
    named = dict(model.named_parameters())
    tensors, missed, largest = {}, 0, 0.0
    for name, support in adapter.shira.items():
        trained = named[f"{name}.weight"].detach()
        base = trained.clone()
        delta.weights[f"{name}.weight"].toggle_(base)
        indices, values = shira_entries(support, base, trained, adapter.rank)
        tensors[f"{PREFIX}{name}.shira_weight"] = values
        tensors[f"{PREFIX}{name}.shira_indices"] = indices
        base += torch.sparse_coo_tensor(indices, values, base.shape, check_invariants=True)
        missed += int((base != trained).sum())
        largest = max(largest, float((base.float() - trained.float()).abs().max()))
    state = model.state_dict()
    for name in adapter.whole:
        for key, value in state.items():
            if key.startswith(f"{name}."):
                tensors[PREFIX + key] = value.contiguous()
    for name in adapter.biases:
        wrapped = (
            f"{module_of(name)}.base_layer" if module_of(name) in adapter.shira else module_of(name)
        )
        tensors[f"{PREFIX}{wrapped}.bias"] = named[name].detach()
    return tensors, Missed(missed, largest)


def _config(adapter: Adapter, source: str, task_type: str, delta: Delta) -> str:
    config = {
        "peft_type": "SHIRA",
        "task_type": task_type,
        "base_model_name_or_path": source,
        "revision": delta.header.base.revision,
        "inference_mode": True,
        "r": adapter.rank,
        "mask_type": "random",  # made and then replaced by the indices of the file
        "random_seed": 0,
        "target_modules": list(adapter.shira),
        "modules_to_save": adapter.whole,
        "fan_in_fan_out": False,
        "init_weights": True,
    }
    return json.dumps(config, indent=2) + "\n"


def _card(exported: Exported, task: Task, delta: Delta) -> str:
    auto = task.auto.__name__
    notes = "\n".join(f"- {line}" for line in exported.sentences())
    return f"""# A sift delta as a PEFT adapter

```python
import torch
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained(
    {exported.base!r}, {task.published.arguments}, dtype=torch.{delta.header.base.dtype}
)
model = PeftModel.from_pretrained(base, "this folder")
```

{notes}
"""


def _few(names: Collection[str]) -> str:
    """The first few of many names, in a line, and how many more."""
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
    trained = torch.tensor(delta.header.logits)
    difference = float((again - trained).abs().max())
    limit = TOLERANCE[delta.header.base.dtype] * max(1.0, float(trained.abs().max()))
    if not difference <= limit and not partial:
        raise SiftError(
            f"with the adapter, logits differ from the trained model's by up to {difference:.3g}",
            ExitCode.NOT_VERIFIED,
        )
    return difference
