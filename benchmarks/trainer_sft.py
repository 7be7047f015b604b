"""Fine-tunes on chats with TRL's SFTTrainer and PEFT's LoRA: what people run today.

usage: python benchmarks/trainer_sft.py MODEL DATA --out OUT [--packing] [--rank 4] ...

Written as TRL's documentation shows it: rows as prompts and completions, of which the latter are
learnt, and all that is not given here at TRL's defaults, such as activations that are computed
again in the backward pass (--keep-activations turns that off). Not its bfloat16, which many CPUs
emulate. A packed step is one pack of 1,024 tokens, any other 8 rows. Writes OUT/summary.json.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main() -> None:
    """Trains, evaluates, saves the adapter."""
    started = time.perf_counter()
    given = options().parse_args()
    trainer = trainer_of(given)
    trainer.train()
    trainer.save_model(str(given.out / "adapter"))
    losses = [one["eval_loss"] for one in trainer.state.log_history if "eval_loss" in one]
    summary = {
        "metrics": {"loss": losses[-1]},
        "steps": trainer.state.global_step,
        "trained": sum(w.numel() for w in trainer.model.parameters() if w.requires_grad),
        "wall_time_s": time.perf_counter() - started,
    }
    (given.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def options() -> argparse.ArgumentParser:
    """What may be asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--keep-activations", action="store_true")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--seed", type=int, default=42)
    return parser


def trainer_of(given: argparse.Namespace, callbacks: Sequence[Any] = ()) -> Any:
    """TRL's trainer with its rows and its adapter; it evaluates after each epoch."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    files = {split: str(Path(given.data, f"{split}.jsonl")) for split in ("train", "validation")}
    rows = load_dataset("json", data_files=files, cache_dir=str(given.out / "cache"))
    if given.rows:
        rows["train"] = rows["train"].select(range(given.rows))
    rows = rows.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
        remove_columns="messages",
    )
    rank, size = given.rank, 1 if given.packing else 8
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(given.model),
        args=SFTConfig(
            output_dir=str(given.out),
            num_train_epochs=given.epochs,
            max_steps=given.max_steps,
            per_device_train_batch_size=size,
            per_device_eval_batch_size=size,  # packs of a batch become one row
            packing=given.packing,
            learning_rate=given.learning_rate,
            eval_strategy="epoch",
            save_strategy="no",
            seed=given.seed,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            **({"gradient_checkpointing": False} if given.keep_activations else {}),
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
        ),
        callbacks=list(callbacks),
    )


if __name__ == "__main__":
    main()
