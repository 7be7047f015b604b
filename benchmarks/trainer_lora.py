"""Fine-tunes a task with Hugging Face's Trainer and PEFT's LoRA: what people run today.

usage: python benchmarks/trainer_lora.py MODEL DATA --task rte --out OUT [--rank 4] ...

Written as the libraries' own examples are: dynamic padding, fused AdamW, an evaluation after each
epoch, everything else at its default. Writes OUT/summary.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

COLUMNS = {
    "rte": ("sentence1", "sentence2"),
    "cola": ("sentence",),
    "sst2": ("sentence",),
}


def main() -> None:
    """Trains, evaluates, saves the adapter."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--task", required=True, choices=COLUMNS)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--seed", type=int, default=42)
    given = parser.parse_args()

    import numpy as np
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from sklearn.metrics import accuracy_score, matthews_corrcoef
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(given.seed)
    files = {
        split: sorted(str(file) for file in Path(given.data).glob(f"{split}*.parquet"))
        for split in ("train", "validation")
    }
    rows = load_dataset("parquet", data_files=files, cache_dir=str(given.out / "cache"))
    if given.rows:
        rows["train"] = rows["train"].select(range(given.rows))
    tokenizer = AutoTokenizer.from_pretrained(given.model)

    def encode(batch: dict[str, list[Any]]) -> Any:
        texts = [batch[column] for column in COLUMNS[given.task]]
        return tokenizer(*texts, truncation=True, max_length=given.max_length)

    rows = rows.map(encode, batched=True)
    model = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=2)
    linear = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear" and not name.startswith("classifier")
    ]
    config = LoraConfig(
        task_type="SEQ_CLS", r=given.rank, lora_alpha=2 * given.rank, target_modules=linear
    )

    def metrics(found: Any) -> dict[str, float]:
        predicted = np.argmax(found.predictions, axis=-1)
        if given.task == "cola":
            return {"matthews_correlation": float(matthews_corrcoef(found.label_ids, predicted))}
        return {"accuracy": float(accuracy_score(found.label_ids, predicted))}

    trainer = Trainer(
        model=get_peft_model(model, config),
        args=TrainingArguments(
            output_dir=str(given.out),
            num_train_epochs=given.epochs,
            per_device_train_batch_size=given.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=given.learning_rate,
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=10,
            seed=given.seed,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
    )
    trainer.train()
    trainer.save_model(str(given.out / "adapter"))
    found = trainer.state.log_history[-2]
    summary = {
        "metrics": {k.removeprefix("eval_"): v for k, v in found.items() if k.startswith("eval_")},
        "steps": trainer.state.global_step,
        "trained": sum(w.numel() for w in trainer.model.parameters() if w.requires_grad),
        "wall_time_s": time.perf_counter() - started,
    }
    (given.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
