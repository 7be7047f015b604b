"""Evaluation: the order of rows, the splits of MNLI, outputs that are not finite."""

from pathlib import Path

import pytest
import torch

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.loading import load_model, load_tokenizer, read_config
from sift_cli.recipe import load_recipe
from sift_cli.runs.session import Session, open_session
from sift_cli.tasks.evaluation import collect_outputs, probe
from sift_cli.tasks.kinds import task_of_config
from sift_cli.tasks.labelled import load_task
from sift_cli.tasks.sources import Source
from sift_cli.tasks.tokens import encode
from tests.support.models import save_base


@pytest.fixture
def session(recipe_file: Path) -> Session:
    return open_session(load_recipe(recipe_file))


def test_logits_come_in_the_order_of_the_rows(session: Session) -> None:
    data = session.evaluation[""]
    together = collect_outputs(session.task, session.model, data, session.collate, batch_size=5)
    session.model.eval()
    for at in range(len(data)):
        batch = session.collate(data.take([at]))
        with torch.no_grad():
            alone = session.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
        torch.testing.assert_close(together[at], alone, rtol=1e-4, atol=1e-5)


def test_accuracy_is_counted_by_hand(session: Session) -> None:
    data = session.evaluation[""]
    logits = collect_outputs(session.task, session.model, data, session.collate, batch_size=4)
    right = [
        int(row.argmax()) == label for row, label in zip(logits, data.rows["label"][:], strict=True)
    ]
    assert session.evaluate()["accuracy"] == sum(right) / len(right)


def test_evaluation_leaves_the_mode_of_the_model(session: Session) -> None:
    session.model.train()
    session.evaluate()
    assert session.model.training


def test_suffixes_name_the_splits(session: Session) -> None:
    session.evaluation["_mismatched"] = session.evaluation[""]
    found = session.evaluate()
    assert found["accuracy"] == found["accuracy_mismatched"]


def test_outputs_that_are_not_finite_stop(session: Session) -> None:
    session.model.classifier.bias.data.fill_(float("inf"))
    with pytest.raises(SiftError, match="outputs are not finite") as caught:
        session.evaluate()
    assert caught.value.code == ExitCode.NOT_FINITE


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_the_probe_marks_a_model(architecture: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "m", architecture)
    config = read_config(folder)
    task = task_of_config(config)
    loaded = load_model(folder, task.auto, config, new_head=True)
    first = probe(task, loaded.model, config)
    assert first.shape == (4, 3)
    assert torch.equal(probe(task, loaded.model, config), first)
    next(p for n, p in loaded.model.named_parameters() if "0." in n).data *= 1.5
    assert not torch.equal(probe(task, loaded.model, config), first)


def test_a_second_split_can_be_scored(data: Path, base: Path) -> None:
    task = load_task(Source(str(data), "sst2", split="train"), train=False)
    rows = encode(task.evaluation[""], load_tokenizer(base), 16)
    assert len(rows) == 48
