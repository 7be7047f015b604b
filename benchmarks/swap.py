"""Swapping one delta for another in memory, beside PEFT SHiRA's unmerge and merge.

usage: python benchmarks/swap.py MODEL [--rank 3] [--rounds 9]

Both have the same random entries, rank * (rows + columns) of every linear layer, two adapters each.
Swaps alternate; prints the median time of each, the ratio, and whether the weights afterwards are
the base's bit for bit.
"""

import argparse
import time
import warnings
from pathlib import Path
from statistics import median

import torch
from peft import ShiraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from sift_cli import Delta
from sift_cli.delta.file import weight_delta
from sift_cli.delta.header import Header
from sift_cli.delta.identity import rest_fingerprints
from sift_cli.models.fingerprints import dtype_name, state_fingerprints
from sift_cli.models.loading import quiet
from sift_cli.sparse import Support

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT = ["query", "key", "value", "dense"]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    ours, theirs = load(given.model), load(given.model)
    targets = [
        one for one in LLAMA + BERT if any(n.endswith(one) for n, _ in theirs.named_modules())
    ]
    config = ShiraConfig(r=given.rank, target_modules=targets, init_weights=False)
    shira = get_peft_model(theirs, config, adapter_name="a")
    shira.add_adapter("b", config)
    deltas = [delta_of(ours, shira, name) for name in ("a", "b")]
    began = time.perf_counter()
    deltas[0].apply_(ours)
    first = time.perf_counter() - began
    deltas[1].swap_(ours)
    shira.merge_adapter(["a"])
    times: dict[str, list[float]] = {"sift": [], "shira": []}
    for at in range(given.rounds + 1):
        began = time.perf_counter()
        deltas[at % 2].swap_(ours)
        times["sift"].append(time.perf_counter() - began)
        began = time.perf_counter()
        shira.unmerge_adapter()
        shira.merge_adapter(["b" if at % 2 == 0 else "a"])
        times["shira"].append(time.perf_counter() - began)
    deltas[given.rounds % 2].undo_(ours)
    shira.unmerge_adapter()
    entries = deltas[0].entries
    total = sum(weight.numel() for weight in ours.parameters())
    print(
        f"{given.model.name}, {ours.dtype}, {entries:,} entries ({entries / total:.2%}), "
        f"{torch.get_num_threads()} threads"
    )
    print("| | swap, ms (median) | slowest | base afterwards |\n| --- | --- | --- | --- |")
    kept = load(given.model).state_dict()
    for name, state in (("sift", ours.state_dict()), ("shira", base_state(shira))):
        spent = times[name][1:]
        differ = sum(not torch.equal(kept[key], value) for key, value in state.items())
        said = "equal" if not differ else f"{differ} tensors differ"
        print(f"| {name} | {1e3 * median(spent):.1f} | {1e3 * max(spent):.1f} | {said} |")
    print(f"ratio {median(times['shira'][1:]) / median(times['sift'][1:]):.1f}")
    print(f"the first application, which reads the whole model: {1e3 * first:.0f} ms")


def load(path: Path) -> torch.nn.Module:
    """The model, its head the same each time."""
    torch.manual_seed(0)
    with quiet():
        return AutoModelForSequenceClassification.from_pretrained(path, dtype="auto", num_labels=2)


def base_state(shira: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors under the names that they had before PEFT."""
    state = shira.base_model.model.state_dict()
    return {
        key.replace(".base_layer", ""): value for key, value in state.items() if "shira" not in key
    }


def delta_of(model: torch.nn.Module, shira: torch.nn.Module, adapter: str) -> Delta:
    """The delta with the entries of a SHiRA adapter."""
    marks = state_fingerprints(model, ())
    named = dict(model.named_parameters())
    weights = {}
    for name, module in shira.base_model.model.named_modules():
        if not hasattr(module, "shira_weight"):
            continue
        weight = named[f"{name}.weight"].detach()
        rows, columns = module.shira_indices[adapter].long()
        positions, order = (rows * weight.shape[1] + columns).sort()
        support = Support.of(weight.shape, positions)
        before = support.gather(weight)
        change = module.shira_weight[adapter].detach()[order] * 1e-3
        whole = weight.clone()
        support.scatter_(whole, (before.float() + change).to(weight.dtype))
        key = f"{name}.weight"
        weights[key] = weight_delta(support, before, support.gather(whole), marks[key], whole)
    dtype = dtype_name(next(model.parameters()).dtype)
    header = Header.model_validate({"base": {"path": "base", "dtype": dtype}})
    return Delta(weights, {}, rest_fingerprints(marks, weights), header)


if __name__ == "__main__":
    main()
