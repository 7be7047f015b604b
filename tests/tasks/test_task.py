"""What a task answers, for classes, numbers and something else; that nothing else is asked."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sift_cli.errors import SiftError
from sift_cli.recipe import Recipe, load_recipe
from sift_cli.runs import session as sessions
from sift_cli.runs.session import Session, open_session
from sift_cli.tasks.classification import task_of_labels
from sift_cli.tasks.kinds import expected_task, task_of_config, task_of_tuned
from sift_cli.tasks.metrics import METRICS
from sift_cli.training import train
from sift_cli.training.step import add_gradient
from tests.support.completions import PERPLEXITY, UNSEEN, Completions
from tests.support.models import save_base

KINDS = ["labels", "numbers", "completions"]


@pytest.fixture
def completions(monkeypatch: pytest.MonkeyPatch, recipe_file: Path, tmp_path: Path) -> Recipe:
    """A recipe of which every row and number is that of a language model's task."""
    monkeypatch.setitem(METRICS, "perplexity", PERPLEXITY)
    monkeypatch.setattr(sessions, "load_task", lambda *args, **more: Completions())
    base = save_base(tmp_path / "llama", "llama")
    changes = [f"model.path={base}", "train.batch_size=4", "train.learning_rate=0.01"]
    return load_recipe(recipe_file, [*changes, "eval.every=1", "selection.density=0.2"])


def opened(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Session:
    if kind == "completions":
        return open_session(request.getfixturevalue("completions"))
    changes = []
    if kind == "numbers":
        rows = [{"sentence": "good " * (1 + at % 5), "much": at / 7} for at in range(24)]
        (tmp_path / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = [f"data.path={tmp_path / 'numbers.jsonl'}", "data.task=custom"]
        changes += ["data.text=sentence", "data.label=much", "data.holdout=0.2"]
    return open_session(load_recipe(request.getfixturevalue("recipe_file"), changes))


def gradients(session: Session, rows: list[list[int]]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of one step."""
    session.model.zero_grad()
    loss = add_gradient(session, rows)
    assert loss.shape == ()
    return float(loss), {
        name: weight.grad.clone()
        for name, weight in session.model.named_parameters()
        if weight.grad is not None
    }


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_make_one_step(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    session = opened(kind, request, tmp_path)
    session.model.eval()
    wanted, whole = gradients(session, [list(range(9))])
    assert any(float(one.abs().max()) > 1e-3 for one in whole.values())
    for rows in ([[at] for at in range(9)], [[0], [1, 2, 3, 4, 5], [6, 7, 8]]):
        loss, parts = gradients(session, rows)
        assert loss == pytest.approx(wanted, rel=1e-5)
        for name, one in whole.items():
            torch.testing.assert_close(parts[name], one, rtol=1e-3, atol=1e-6, msg=name)


def test_a_mean_over_tokens_is_that_of_all_targets(completions: Recipe) -> None:
    """Each row alone and without padding; means of means would weigh short answers more."""
    # rule 3.6
    session = open_session(completions)
    assert session.train is not None
    model = session.model.eval()
    losses, means = [], []
    for one in session.train.take(range(9)):
        logits = model(input_ids=torch.tensor([one["input_ids"]])).logits[0, :-1]
        pairs = [(at, to) for at, to in enumerate(one["labels"][1:]) if to != UNSEEN]
        at, to = torch.tensor(pairs).T
        found = nn.functional.cross_entropy(logits[at], to, reduction="none")
        losses += found.unbind()
        means.append(float(found.detach().mean()))
    wanted = torch.stack(losses).mean()
    model.zero_grad()
    wanted.backward()
    true = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    loss, found = gradients(session, [[0, 1], [2, 3, 4], [5, 6, 7, 8]])
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert loss != pytest.approx(sum(means) / 9, rel=1e-3)
    for name, one in true.items():
        torch.testing.assert_close(found[name], one, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_counted_of_rows_is_what_their_loss_is_the_sum_of(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    session = opened(kind, request, tmp_path)
    assert session.train is not None
    for rows in ([0], [1, 5, 3], list(range(12))):
        batch = session.collate(session.train.take(rows))
        loss = session.task.loss(session.model, batch)
        assert loss.sum.shape == ()
        assert loss.count == session.task.counted(session.train, rows) == session.counted([rows])
        outputs = session.task.outputs(session.model, batch)
        assert len(outputs) == len(rows)


def test_a_run_keeps_the_lowest_of_a_metric_that_falls(completions: Recipe, tmp_path: Path) -> None:
    """From choosing entries to the delta, with a task that has no classes."""
    # rule 3.7
    summary = train(completions, tmp_path / "run")
    logged = [json.loads(one) for one in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    evaluated = {one["step"]: one["metrics"]["perplexity"] for one in logged if "metrics" in one}
    assert list(evaluated) == list(range(1, 7))
    lowest = min(evaluated.values())
    assert summary.task == "completions"
    assert summary.metrics == {"perplexity": lowest}
    assert evaluated[summary.kept_step] == lowest < summary.metrics_before["perplexity"]
    best = [one["step"] for one in logged if one.get("best")]
    assert all(evaluated[step] == min(list(evaluated.values())[:step]) for step in best)
    text = (tmp_path / "run/predictions.jsonl").read_text()
    lines = [json.loads(one) for one in text.splitlines()]
    assert [one["row"] for one in lines] == list(range(9))
    assert {one["split"] for one in lines} == {"validation"}
    total, count = (sum(one[key] for one in lines) for key in ("loss", "tokens"))
    assert torch.tensor(total / count).exp().item() == pytest.approx(lowest, rel=1e-5)


def test_a_run_goes_back_to_the_lowest_where_training_makes_it_worse(
    completions: Recipe, tmp_path: Path
) -> None:
    values = completions.model_copy(
        update={"train": completions.train.model_copy(update={"learning_rate": 3.0})}
    )
    summary = train(values, tmp_path / "run")
    logged = [json.loads(one) for one in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = {one["step"]: one["metrics"]["perplexity"] for one in logged if "metrics" in one}
    assert found[6] > min(found.values())
    assert summary.kept_step == min(found, key=lambda step: found[step])


@pytest.mark.parametrize("labels", [("bad", "good"), ("a", "b", "c"), None])
def test_a_configuration_tells_the_task_that_made_it(
    base: Path, labels: tuple[str, ...] | None
) -> None:
    task = task_of_labels(labels)
    config = task.configure(base)
    again = task_of_config(config)
    assert again.labels == labels
    assert again.header() == task.header() == {"labels": list(labels) if labels else None}
    assert again.fitted(config).labels == labels
    config.architectures = ["BertForSequenceClassification"]
    assert task_of_tuned(config, "there").labels == labels
    with pytest.raises(
        SiftError, match=r"has the labels \[a, b, c, d, e, f, g\]|outputs, the task"
    ):
        task_of_labels("abcdefg").fitted(config)
    task.unconfigure(config)
    assert (config.num_labels, config.problem_type) == (2, None)


def test_a_task_without_rows_is_what_the_recipe_says() -> None:
    assert expected_task("sst2", None).labels == ("negative", "positive")
    assert expected_task("sst2", ["no", "yes"]).labels == ("no", "yes")
    assert expected_task("stsb", None).labels is None
    assert expected_task("custom", None).width == 2


def test_groups_are_the_rows_of_each_label(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    session = opened("labels", request, tmp_path)
    assert session.train is not None
    groups = session.task.groups(session.train)
    assert list(groups) == ["negative", "positive"]
    assert groups["positive"] == list(range(1, 48, 2))
    assert opened("numbers", request, tmp_path).task.groups(session.train) == {}


def test_cards_say_what_comes_out() -> None:
    two = task_of_labels(["bad", "good"]).published
    assert two.predicts == "`bad`, `good`"
    assert two.arguments == "num_labels=2, id2label={0: 'bad', 1: 'good'}"
    number = task_of_labels(None)
    assert (number.published.predicts, number.published.arguments) == ("a number", "num_labels=1")
    assert "text_pair" in number.usage(paired=True)
    assert "text_pair" not in number.usage(paired=False)
