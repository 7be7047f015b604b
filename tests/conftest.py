"""The environment of every test, and a tiny base, data and recipe in a temporary folder."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait for each other

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on the CPU

from tests.support.command import Run
from tests.support.models import save_base
from tests.support.rows import write_rows


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny BERT backbone."""
    return save_base(tmp_path / "base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """48 training and 16 validation rows with SST-2 columns."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "train.jsonl", 48, seed=1)
    write_rows(folder / "validation.jsonl", 16, seed=2)
    return folder


@pytest.fixture
def recipe_text(base: Path, data: Path) -> str:
    """A recipe that trains in a second."""
    return f"""\
model:
  path: {base}
data:
  path: {data}
  task: sst2
  max_length: 16
selection:
  policy: sift
  density: 0.05
train:
  epochs: 1
  batch_size: 8
  learning_rate: 1.0e-2
  seed: 3
"""


@pytest.fixture
def recipe_file(tmp_path: Path, recipe_text: str) -> Path:
    """`recipe_text` on disk."""
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe_text)
    return path


@pytest.fixture
def run(recipe_file: Path, tmp_path: Path) -> Run:
    """Trains three steps of the recipe with what is changed in it; gives the delta."""
    from sift_cli.recipe import load_recipe
    from sift_cli.training import train

    def go(*changes: str, name: str = "run") -> Path:
        short = ["train.max_steps=3", *changes]
        train(load_recipe(recipe_file, short), tmp_path / name, overwrite=True)
        return tmp_path / name / "delta.safetensors"

    return go
