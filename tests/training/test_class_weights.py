"""Class weights and label smoothing against torch's own cross-entropy and scikit-learn."""

import json
from collections.abc import Sequence
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.nn.functional import cross_entropy

from sift_cli.errors import SiftError
from sift_cli.recipe import load_recipe, parse_recipe
from sift_cli.runs.session import Session, open_session
from sift_cli.tasks.classification import Classification
from sift_cli.training import train
from sift_cli.training.head import Readout, prior
from sift_cli.training.step import add_gradient
from tests.support.command import sift
from tests.support.models import WORDS

LABELS = ["few"] * 3 + ["many"] * 13 + ["some"] * 5


@pytest.fixture
def recipe(recipe_file: Path, data: Path) -> Path:
    """The recipe with rows of three classes, of which there are 3, 13 and 5."""
    rows = [
        {"words": f"{WORDS[at]} {WORDS[at + 1]}", "kind": label} for at, label in enumerate(LABELS)
    ]
    for split in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{split}.jsonl").write_text(text)
    recipe_file.write_text(
        recipe_file.read_text().replace("task: sst2", "task: custom\n  text: words\n  label: kind")
    )
    return recipe_file


def opened(recipe: Path, *changes: str) -> Session:
    return open_session(load_recipe(recipe, changes))


def rows_and_logits(session: Session) -> tuple[Tensor, Tensor]:
    assert session.train is not None
    session.model.eval()
    batch = session.collate(session.train.take(range(len(LABELS))))
    return session.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits, batch["labels"]


def gradient(session: Session, loss: Tensor | None, parts: Sequence[list[int]] = ()) -> Tensor:
    """The gradient of a loss, or of a step in `parts`, at the head."""
    session.model.zero_grad()
    if loss is None:
        add_gradient(session, parts)
    else:
        loss.backward()
    assert session.model.classifier.weight.grad is not None
    return session.model.classifier.weight.grad.clone()


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["null", "balanced", "{few: 5, some: 0.25}"]),
    st.sampled_from([0.0, 0.2]),
    st.integers(1, 9),
)
def test_a_step_in_parts_is_torch_s_weighted_mean(
    recipe: Path, weights: str, smoothing: float, size: int
) -> None:
    session = opened(recipe, f"train.class_weights={weights}", f"train.label_smoothing={smoothing}")
    assert isinstance(session.task, Classification)
    wanted = {
        "null": None,
        "{few: 5, some: 0.25}": torch.tensor([5.0, 1.0, 0.25]),
        "balanced": torch.tensor(
            compute_class_weight("balanced", classes=np.unique(LABELS), y=LABELS)
        ).float(),
    }[weights]
    logits, labels = rows_and_logits(session)
    mean = cross_entropy(logits, labels, wanted, label_smoothing=smoothing)
    parts = [list(range(len(LABELS)))[at : at + size] for at in range(0, len(LABELS), size)]
    assert float(add_gradient(session, parts)) == pytest.approx(mean.item(), rel=1e-5)
    torch.testing.assert_close(
        gradient(session, None, parts), gradient(session, mean), rtol=1e-4, atol=1e-6
    )


def test_weights_change_what_a_run_comes_to_and_runs_learn_with_them(
    recipe: Path, tmp_path: Path
) -> None:
    deltas = {
        change: train(load_recipe(recipe, [f"train.{change}"]), tmp_path / f"{at}").delta_sha256
        for at, change in enumerate(
            ["seed=3", "class_weights=balanced", "class_weights={few: 2}", "label_smoothing=0.1"]
        )
    }
    assert len(set(deltas.values())) == 4


def test_a_head_starts_from_weighted_rows() -> None:
    """A row that counts 3 is as good as three of it."""
    torch.manual_seed(0)
    features, codes = torch.randn(30, 4), torch.arange(30) % 2
    counts = torch.tensor([1.0, 3.0], dtype=torch.float64)[codes]
    again = torch.cat([torch.arange(30), *[torch.arange(1, 30, 2)] * 2])
    torch.testing.assert_close(prior(codes, 2, counts), prior(codes[again], 2))
    weighted = Readout.fit(features, codes, 2, 1.0, True, counts)(features)
    plain = Readout.fit(features, codes, 2, 1.0, True)(features)
    gap = (weighted - plain).diff(dim=1).mean()
    assert float(gap) == pytest.approx(np.log(3), rel=0.2), "odds are three times as high"


@pytest.mark.parametrize("start", ["prior", "probe"])
def test_a_weighted_run_starts_its_head_so(recipe: Path, tmp_path: Path, start: str) -> None:
    changes = [f"train.head_start={start}", "train.max_steps=1", "train.class_weights=balanced"]
    done = sift(
        "train", recipe, "--out", tmp_path / "run", *(x for one in changes for x in ("--set", one))
    )
    assert done.returncode == 0, done.stderr
    if start == "prior":
        assert f"-> {np.log(3):.4f}" in done.stderr, "all three classes count alike"


def test_a_plan_measures_a_step_with_weights(recipe: Path) -> None:
    done = sift("plan", recipe, "--set", "train.class_weights={few: 3}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.class_weights={fwe: 2}", "train.class_weights: no class 'fwe'; there is few, many"),
        ("train.class_weights={few: 0}", "train.class_weights: few: input should be greater than"),
        ("train.class_weights=even", "train.class_weights: give balanced, or {CLASS: WEIGHT}, got"),
        ("train.label_smoothing=1", "train.label_smoothing: input should be less than 1, got 1"),
    ],
)
def test_mistakes_about_weights(recipe: Path, tmp_path: Path, change: str, said: str) -> None:
    done = sift("train", recipe, "--out", tmp_path / "run", "--set", change)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize("change", ["class_weights: balanced", "label_smoothing: 0.1"])
def test_numbers_and_tokens_have_no_classes_to_weigh(recipe: Path, data: Path, change: str) -> None:
    text = f"model: {{path: x}}\ndata: {{path: y, task: text}}\ntrain: {{{change}}}\n"
    with pytest.raises(SiftError, match="it belongs to rows with a label each, and would do"):
        parse_recipe(text, "r.yaml")
    for split in ("train", "validation"):
        rows = [{"words": WORDS[at], "kind": at / 2} for at in range(4)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        SiftError, match="it is for one label a row, and 'kind' holds numbers to predict"
    ):
        opened(recipe, f"train={{{change}}}")
