"""Base + delta as an ordinary Hugging Face folder, one tensor in memory at a time."""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig

from sift_cli.delta.apply import check_base
from sift_cli.delta.cards import model_card
from sift_cli.delta.file import Delta, fingerprint, load_delta, tensor_bytes
from sift_cli.errors import ExitCode, SiftError
from sift_cli.evaluation import probe_logits
from sift_cli.models import (
    DTYPES,
    load_model,
    load_tokenizer,
    model_folder,
    quiet,
    task_config,
    weight_files,
)

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPE_NAMES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
RENAMED = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
# For logits from another machine or library version; on the same one they are equal.
LOGITS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


def merge(
    delta_path: Path,
    out: Path,
    *,
    base: str | None = None,
    undo: bool = False,
    verify: bool = True,
) -> dict[str, Any]:
    """Writes the trained model (with `undo`, the base again) as a folder; says what it verified.

    `base` is the folder to start from: the delta's own base unless given; for `undo` the merged
    one. Fingerprints prove the written weights bit for bit. `verify` also loads the folder anew and
    compares its logits with those of the model as it was trained. Nothing is left in `out` unless
    all succeeds.

    Raises SiftError: exit code 2 where `out` exists or the base cannot be found, 3 for a damaged
    delta or a wrong base, 5 where the reloaded model differs.
    """
    delta = load_delta(delta_path)
    if out.exists():
        raise SiftError(f"{out} exists already; choose another --out or remove it")
    if undo and base is None:
        raise SiftError("--undo needs --base: the merged folder to turn back")
    about = delta.about["base"]
    source = base or about["path"]
    try:
        folder = model_folder(source, None if base else about["revision"])
    except SiftError as error:
        hint = "" if base else "; give the base with --base"
        raise SiftError(f"{error}{hint}", error.code) from None
    config = _config(folder, delta, undo)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        written = _write_weights(folder, partial, delta, config, source, undo)
        with quiet():
            config.save_pretrained(partial)
            load_tokenizer(folder).save_pretrained(partial)
        report: dict[str, Any] = {"out": str(out), "base": source, **written}
        if not undo:
            recipe = yaml.safe_dump(delta.about["recipe"], sort_keys=False, allow_unicode=True)
            (partial / "recipe.yaml").write_text(recipe, encoding="utf-8")
            (partial / "README.md").write_text(model_card(delta.about), encoding="utf-8")
            if verify:
                report |= _verify(partial, delta)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _config(folder: Path, delta: Delta, undo: bool) -> PretrainedConfig:
    about = delta.about["base"]
    if undo:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.architectures = about["architectures"]
        if delta.dense:  # the head was new, and its labels with it
            config.num_labels = 2
            config.problem_type = None
    else:
        config = task_config(folder, delta.about["labels"])
        config.architectures = [delta.about["architecture"]]
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = load_tokenizer(folder).pad_token_id
    config.dtype = DTYPES[about["dtype"]]
    return config  # type: ignore[no-any-return]


@dataclass
class Shard:
    """One safetensors file to write, from one of the base's files."""

    source: Path
    tensors: dict[str, "Planned"] = field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    """A tensor to write: `key` names it in the base's file, else `value` holds it."""

    dtype: torch.dtype
    shape: list[int]
    key: str | None = None
    value: Tensor | None = None


def _write_weights(
    folder: Path, out: Path, delta: Delta, config: PretrainedConfig, source: str, undo: bool
) -> dict[str, Any]:
    """Streams every tensor of the model from the base's files into `out`, changed where need be."""
    names = _tensor_names(config)
    change = _Change(delta, undo)
    shards = [_plan(file, names, change) for file in weight_files(folder)]
    held = {names[name] for shard in shards for name in shard.tensors}
    lacking = sorted({*names.values()} - held - {*delta.dense})
    if lacking:
        raise SiftError(
            f"{source} lacks {len(lacking)} tensors of the model, such as {lacking[0]}",
            ExitCode.WRONG_FILE,
        )
    if not undo:
        for name, tensor in delta.dense.items():
            shards[-1].tensors[name] = Planned(tensor.dtype, list(tensor.shape), value=tensor)
    for shard in shards:
        with (out / shard.source.name).open("wb") as file:
            _write_shard(file, shard, names, change)
    change.check(source)
    if len(shards) > 1:
        _write_index(out, shards)
    return {"tensors": sum(len(s.tensors) for s in shards), "changed": len(change.after)}


def _plan(file: Path, names: dict[str, str], change: "_Change") -> Shard:
    shard = Shard(file)
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118
            name = _owner(key, names)
            if name is None or names[name] in change.delta.dense:
                continue
            piece = opened.get_slice(key)
            dtype = change.dtype(names[name], DTYPE_NAMES[piece.get_dtype()])
            shard.tensors[name] = Planned(dtype, list(piece.get_shape()), key=key)
    return shard


class _Change:
    """What the delta does to each tensor that passes, and the fingerprints seen on the way."""

    def __init__(self, delta: Delta, undo: bool) -> None:
        self.delta, self.undo = delta, undo
        self.before: dict[str, str] = {}  # fingerprints of the base's tensors
        self.after: dict[str, str] = {}  # of the changed ones, as written
        self._default = DTYPES[delta.about["base"]["dtype"]]
        self._kept = delta.about["base"]["kept_dtypes"]

    def dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        """The dtype in which the trained model held this tensor."""
        if name in self.delta.weights:
            return self.delta.weights[name].dtype
        if name in self._kept:
            kept: torch.dtype = getattr(torch, self._kept[name])
            return kept
        return self._default if stored.is_floating_point else stored

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as it is to be written; one that the delta does not fit stays for `check`."""
        mark = fingerprint(tensor)
        self.before[name] = mark
        weight = self.delta.weights.get(name)
        if weight is None or mark != (weight.trained if self.undo else weight.base):
            return tensor
        changed = tensor.clone()
        weight.toggle_(changed)
        self.after[name] = fingerprint(changed)
        if self.undo:
            self.before[name] = self.after[name]
        return changed

    def check(self, source: str) -> None:
        """Raises SiftError where a tensor was not the base's, or did not come out as trained."""
        check_base(self.delta, self.before, source, merged=self.undo)
        for name, mark in self.after.items():
            weight = self.delta.weights[name]
            if mark != (weight.base if self.undo else weight.trained):
                raise SiftError(f"{name} differs from the trained weight", ExitCode.NOT_VERIFIED)


def _tensor_names(config: PretrainedConfig) -> dict[str, str]:
    """Everything that the model saves, with the name its storage goes by where it is tied."""
    with torch.device("meta"), quiet():
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    canonical: dict[int, str] = {}
    names = {name: name for name in model.state_dict()}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names[name] = canonical.setdefault(id(weight), name)
    return names


def _owner(key: str, names: dict[str, str]) -> str | None:
    """The model's name for a tensor of a checkpoint; None for what the model has not.

    A checkpoint may hold the bare backbone (`encoder...` for `bert.encoder...`) or old layer norm
    names.
    """
    for pattern, new in RENAMED:
        key = re.sub(pattern, new, key)
    backbones = sorted({name.split(".")[0] for name in names})
    candidates = [key, *(f"{one}.{key}" for one in backbones)]
    return next((name for name in candidates if name in names), None)


def _write_shard(file: BinaryIO, shard: Shard, names: dict[str, str], change: _Change) -> None:
    """A safetensors file: header length, header, then the bytes of one tensor after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, planned in shard.tensors.items():
        end = offset + torch.Size(planned.shape).numel() * planned.dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_NAMES[planned.dtype],
            "shape": planned.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    with safe_open(shard.source, framework="pt") as opened:
        for name, planned in shard.tensors.items():
            if planned.value is not None:
                tensor = planned.value
            else:
                tensor = opened.get_tensor(planned.key).to(planned.dtype)
                tensor = change.apply(names[name], tensor)
            file.write(tensor_bytes(tensor))


def _write_index(out: Path, shards: list[Shard]) -> None:
    total = sum((out / shard.source.name).stat().st_size for shard in shards)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: shard.source.name for shard in shards for name in shard.tensors},
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _verify(folder: Path, delta: Delta) -> dict[str, Any]:
    """Loads the folder anew and compares its logits with the trained model's."""
    loaded = load_model(folder)
    if loaded.new:
        raise SiftError(f"{folder} lacks {loaded.new[0]}", ExitCode.NOT_VERIFIED)
    trained = torch.tensor(delta.about["logits"])
    again = probe_logits(loaded.model, loaded.model.config)
    difference = float((again - trained).abs().max())
    tolerance = LOGITS_TOLERANCE[delta.about["base"]["dtype"]]
    if not difference <= tolerance * max(1.0, float(trained.abs().max())):
        raise SiftError(
            f"the merged model's logits differ from the trained model's by up to {difference:.3g}",
            ExitCode.NOT_VERIFIED,
        )
    return {"verified": "logits", "logits_difference": difference}
