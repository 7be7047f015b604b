"""Random rows to train on, as files."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from tests.support.models import CONFIGS, WORDS, tiny_tokenizer


def rows_recipe(folder: Path, name: str, dropout: float) -> Path:
    """A recipe of a tiny BERT that has no head, and of rows with one of two labels and a score."""
    data, base, path = folder / "labelled", folder / f"{name}-base", folder / f"{name}.yaml"
    if not data.exists():
        data.mkdir()
        write_rows(data / "train.jsonl", 48, seed=1)
        write_rows(data / "validation.jsonl", 17, seed=2)
        for file in data.iterdir():
            rows = map(json.loads, file.read_text().splitlines())
            scored = [row | {"score": len(row["sentence"]) / 8 + row["label"]} for row in rows]
            file.write_text("".join(json.dumps(row) + "\n" for row in scored))
    torch.manual_seed(0)
    settings = CONFIGS["bert"]()
    settings.hidden_dropout_prob = settings.attention_probs_dropout_prob = dropout
    settings.initializer_range, settings.num_labels = 0.3, 2
    AutoModelForSequenceClassification.from_config(settings).base_model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    path.write_text(
        f"model: {{path: {base}}}\ndata: {{path: {data}, task: sst2, max_length: 16}}\n"
        # the gradient of a key's bias is nothing but rounding, so no one chooses among it
        "selection: {policy: sift, density: 0.1, exclude: [attention.self.key]}\n"
        "train: {max_steps: 6, batch_size: 8, learning_rate: 1.0e-2, seed: 3}\n"
        "eval: {every: 3, batch_size: 4}\nlog: {report: false}\n"
    )
    return path


def write_rows(path: Path, rows: int, seed: int, pair: bool = False) -> None:
    """Random sentences whose label is whether they hold the word `good`."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for number in range(rows):
        count = int(torch.randint(3, 9, (), generator=generator))
        codes = torch.randint(1, len(WORDS), (count,), generator=generator).tolist()
        words = [WORDS[code] for code in codes]
        label = number % 2
        if label:
            words[0] = "good"
        row = {"sentence": " ".join(words), "label": label}
        lines.append(json.dumps(row | ({"other": WORDS[codes[-1]]} if pair else {})))
    path.write_text("\n".join(lines) + "\n")
