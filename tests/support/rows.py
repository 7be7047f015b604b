"""Random rows to train on, as files."""

import json
from pathlib import Path

import torch

from tests.support.models import WORDS


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
