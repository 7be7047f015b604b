"""Datasets: every source, every check, truncation counts, and the set that comes with sift."""

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from transformers import PreTrainedTokenizerFast

from sift_cli.errors import SiftError
from sift_cli.tasks import tokens
from sift_cli.tasks.classification import Classification
from sift_cli.tasks.labelled import load_task
from sift_cli.tasks.sources import BUILTIN, Source, held_of_each
from sift_cli.tasks.table import TASKS
from sift_cli.tasks.tokens import encode
from tests.support.models import VOCABULARY, WORDS, tiny_tokenizer

Row = dict[str, Any]
FORMATS = ("parquet", "jsonl", "json", "csv")
ENDINGS = ".parquet, .jsonl, .json, .csv, .tsv, .conll"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.getbasetemp() / "datasets-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(list(rows)).to_parquet(path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def folder(path: Path, ending: str = "jsonl", **splits: Sequence[Row]) -> str:
    for name, rows in splits.items():
        write(path / f"{name}.{ending}", rows)
    return str(path)


def rows(*labels: Any, key: str = "sentence", label: str = "label") -> list[Row]:
    return [{key: f"text {at}", label: value} for at, value in enumerate(labels)]


def read(path: str, task: str, **options: Any) -> Classification:
    """The task of a source, whose `options` are those of both."""
    own = {one.name: options.pop(one.name) for one in fields(Source) if one.name in options}
    return load_task(Source(path, task, **own), **options)


def refusal(path: str, task: str = "sst2", **options: Any) -> str:
    with pytest.raises(SiftError) as caught:
        read(path, task, **options)
    return str(caught.value)


def custom(path: str, **options: Any) -> Classification:
    return read(path, "custom", text=["words"], label="mark", **options)


# Sources


@pytest.mark.parametrize("ending", FORMATS)
def test_a_folder_of_each_format(tmp_path: Path, ending: str) -> None:
    path = folder(tmp_path, ending, train=rows(0, 1, 1), validation=rows(1, 0))
    task = read(path, "sst2")
    assert task.train is not None
    expected = {"text": ["text 0", "text 1", "text 2"], "label": [0, 1, 1], "row": [0, 1, 2]}
    assert task.train.to_dict() == expected
    assert list(task.evaluation) == [""]
    assert task.evaluation[""].to_dict() == {
        "text": ["text 0", "text 1"],
        "label": [1, 0],
        "row": [0, 1],
    }
    assert (task.name, task.labels, task.metrics, task.width) == (
        "sst2",
        ("negative", "positive"),
        ("accuracy", "loss"),
        2,
    )


@pytest.mark.parametrize("ending", FORMATS)
def test_a_single_file_is_the_training_split(tmp_path: Path, ending: str) -> None:
    folder(tmp_path, ending, rte=rows(0, 1, 1, 0))
    path = str(tmp_path / f"rte.{ending}")
    task = read(path, "sst2", holdout=0.25)
    assert task.train is not None
    assert (len(task.train), len(task.evaluation[""])) == (3, 1)
    assert refusal(path) == (
        f"{path}: no split 'validation'; there is train; set data.holdout: 0.1 to hold out "
        "training rows"
    )


def test_files_named_as_the_hub_names_them(tmp_path: Path) -> None:
    path = folder(
        tmp_path,
        **{
            "train-00000-of-00002": rows(0, 1),
            "train-00001-of-00002": rows(1, 1, 0),
            "dev": rows(1, 0),
            "training_notes": rows(9),
        },
    )
    task = read(path, "sst2")
    assert task.train is not None
    assert task.train["label"][:] == [0, 1, 1, 1, 0]
    assert task.train["row"][:] == [0, 1, 2, 3, 4]
    assert len(task.evaluation[""]) == 2


def test_a_name_that_goes_on_with_a_number(tmp_path: Path) -> None:
    """As `test200.jsonl`; a file that is called just like the split comes before it."""
    path = folder(tmp_path, train=rows(0, 1, 1), validation2=rows(0, 1), train50=rows(0, 1))
    task = read(path, "sst2")
    assert task.train is not None
    assert (len(task.train), len(task.evaluation[""])) == (3, 2)


def test_a_folder_without_a_split_says_what_it_holds(tmp_path: Path) -> None:
    path = folder(tmp_path, alpaca=rows(0, 1))
    assert refusal(path).endswith(f"({ENDINGS}); it holds alpaca.jsonl")


def test_a_folder_with_a_folder_of_the_task(tmp_path: Path) -> None:
    folder(tmp_path / "sst2", train=rows(0, 1), validation=rows(1))
    folder(tmp_path / "cola", train=rows(1, 0, 1), validation=rows(1))
    for task, size in (("sst2", 2), ("cola", 3)):
        train = read(str(tmp_path), task).train
        assert train is not None
        assert len(train) == size
    assert refusal(str(tmp_path), "rte").startswith(f"data.path: {tmp_path} holds no train or ")


def test_splits_may_differ_in_columns_that_no_task_reads(tmp_path: Path) -> None:
    extra = [{**row, "topic": "x", "row": "own"} for row in rows(1, 0, 1)]
    task = read(folder(tmp_path, train=rows(0, 1), validation=extra), "sst2")
    assert task.evaluation[""].to_dict() == {
        "text": ["text 0", "text 1", "text 2"],
        "label": [1, 0, 1],
        "row": [0, 1, 2],
    }


@pytest.mark.parametrize(
    "path", ["nope.csv", "data/train.JSONL", "a.tsv", "./x/train.jsonl", "../x", "~/x.csv", "/x"]
)
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", None)
    monkeypatch.setattr(datasets, "get_dataset_config_names", None)
    within = "" if path[0] in "~/" else f" in {Path.cwd()}"
    assert refusal(path) == f"data.path: {path}: no such folder or file{within}"


@pytest.mark.parametrize("path", ["nobody/no-such-dataset", "no-such-dataset"])
def test_a_hub_id_that_cannot_be_reached(path: str) -> None:
    said = refusal(path)
    assert said.startswith(f"data.path: {path} is not on this machine nor on the hub: Couldn't")
    assert "\n" not in said


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    assert refusal(f"{tmp_path}/none") == f"data.path: {tmp_path}/none: no such folder or file"
    assert refusal("./none") == f"data.path: ./none: no such folder or file in {Path.cwd()}"


def test_an_unknown_built_in_set_lists_those_there_are() -> None:
    assert refusal("builtin:revews") == (
        "data.path: no such built-in dataset builtin:revews; there is builtin:notes, "
        "builtin:reviews"
    )


def test_a_file_of_another_format(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("text")
    assert refusal(str(path)) == f"data.path: {path} is not one of {ENDINGS}"
    assert refusal(str(tmp_path)) == (
        f"data.path: {tmp_path} holds no train or validation file ({ENDINGS})"
    )


def test_a_folder_of_several_formats(tmp_path: Path) -> None:
    folder(tmp_path, "csv", train=rows(0, 1))
    path = folder(tmp_path, "jsonl", validation=rows(0, 1))
    assert refusal(path) == f"data.path: {path} holds files of several formats; keep one"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("train.jsonl", b'{"sentence": \n', "/train.jsonl:1: not JSON: "),
        ("train.parquet", b"PAR1", " cannot be read: "),
        ("train.csv", b'a,b\n1,"\n', "/train.csv:2: unexpected end of data"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    said = refusal(str(tmp_path))
    assert said.startswith(f"data.path: {tmp_path}{told}")
    assert "\n" not in said


# Splits


@pytest.mark.parametrize(
    ("name", "content"), [("jsonl", ""), ("jsonl", "\n \n"), ("csv", "sentence,label\n")]
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_split(tmp_path: Path, name: str, content: str, split: str) -> None:
    path = folder(tmp_path, name, train=rows(0, 1), validation=rows(1))
    (tmp_path / f"{split}.{name}").write_text(content)
    assert refusal(path) == f"data.path: {path}/{split}.{name}: the split {split!r} is empty"


def test_an_empty_split_of_parquet(tmp_path: Path) -> None:
    path = folder(tmp_path, "parquet", train=rows(0, 1), validation=rows(1))
    features = datasets.Features(sentence=datasets.Value("string"), label=datasets.Value("int64"))
    empty = datasets.Dataset.from_dict({"sentence": [], "label": []}, features=features)
    empty.to_parquet(tmp_path / "validation.parquet")
    said = f'data.path: {path} cannot be read: Instruction "validation" corresponds to no data!'
    assert refusal(path) == said


def test_a_missing_split_has_a_way_out_where_there_is_one(tmp_path: Path) -> None:
    path = folder(tmp_path, train=rows(0, 1), validation=rows(0))
    assert refusal(path, split="test") == f"{path}: no split 'test'; there is train, validation"
    (tmp_path / "validation.jsonl").unlink()
    assert refusal(path) == (
        f"{path}: no split 'validation'; there is train; set data.holdout: 0.1 to hold out "
        "training rows"
    )


def test_evaluation_needs_no_training_split(tmp_path: Path) -> None:
    path = folder(tmp_path, validation=rows(0, 1), test=rows(1, 1, 1))
    task = read(path, "sst2", train=False, split="test")
    assert task.train is None
    assert task.evaluation[""]["label"][:] == [1, 1, 1]
    assert refusal(path) == f"{path}: no split 'train'; there is test, validation"


def test_holdout_parts_the_training_rows(tmp_path: Path) -> None:
    path = folder(tmp_path, train=rows(*[0, 1] * 10), validation=rows(1))

    def parted(seed: int) -> tuple[list[int], list[int]]:
        task = read(path, "sst2", holdout=0.2, seed=seed)
        assert task.train is not None
        for part in (task.train, task.evaluation[""]):
            for row in part:
                assert row["text"] == f"text {row['row']}"
                assert row["label"] == row["row"] % 2
        return task.train["row"][:], task.evaluation[""]["row"][:]

    train, held = parted(seed=1)
    assert (len(train), len(held)) == (16, 4)
    assert sorted(train + held) == list(range(20))
    assert parted(seed=1) == (train, held)
    assert parted(seed=2) != (train, held)


def test_holdout_takes_of_each_class_in_proportion(tmp_path: Path) -> None:
    """However the rows are ordered, and at least one of a rare class."""
    path = folder(tmp_path, train=rows(*["a"] * 70, *["b"] * 27, *["c"] * 3, key="t"))
    for seed in range(5):
        task = read(path, "custom", text=["t"], holdout=0.1, seed=seed)
        assert task.train is not None
        assert Counter(task.evaluation[""]["label"]) == {0: 7, 1: 2, 2: 1}
        assert Counter(task.train["label"]) == {0: 63, 1: 25, 2: 2}
        assert task.ready(None, packs=False, chunk_loss=0)[1] == [  # type: ignore[arg-type]
            "evaluation: 10 rows for 3 labels, so that one row moves accuracy by 0.1"
        ]


@given(st.lists(st.sampled_from("aabbc"), min_size=2, max_size=60), st.data())
def test_what_is_held_out_of_each_class(classes: list[str], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(classes) - 1))
    kept, held = held_of_each(classes, count, seed=data.draw(st.integers(0, 3)))
    assert sorted(kept + held) == list(range(len(classes)))
    assert len(held) == count
    sizes, of = Counter(classes), Counter(classes[row] for row in held)
    pairs = sum(size > 1 for size in sizes.values())
    if pairs <= count <= len(classes) - len(sizes):
        for name, size in sizes.items():
            assert of[name] < size
            assert abs(of[name] - count * size / len(classes)) < len(sizes)
            assert of[name] > 0 or size == 1


def test_labels_that_no_row_to_evaluate_on_has_are_told(tmp_path: Path) -> None:
    path = folder(
        tmp_path, train=rows(*["a", "b", "c"] * 4, key="t"), validation=rows("a", key="t")
    )
    task = read(path, "custom", text=["t"])
    said = task.ready(None, packs=False, chunk_loss=0)[1]  # type: ignore[arg-type]
    assert said[0] == "evaluation: no row has the label [b, c]"
    assert "1 rows for 3 labels" in said[1]


def test_holdout_leaves_another_split_alone(tmp_path: Path) -> None:
    path = folder(tmp_path, train=rows(*[0, 1] * 5), test=rows(1, 0, 0))
    task = read(path, "sst2", holdout=0.5, split="test")
    assert task.train is not None
    assert (len(task.train), len(task.evaluation[""])) == (10, 3)


def test_holdout_of_every_row(tmp_path: Path) -> None:
    path = folder(tmp_path, train=rows(0, 1))
    assert refusal(path, holdout=0.6) == "data.holdout: 0.6 leaves none of 2 rows to train on"


def test_max_train_rows_is_a_seeded_sample_with_the_numbers_of_its_source(tmp_path: Path) -> None:
    path = folder(tmp_path, train=rows(*[0, 1] * 20), validation=rows(*[0, 1] * 20))

    def sample(seed: int, count: int = 10) -> list[int]:
        task = read(path, "sst2", max_train_rows=count, seed=seed)
        assert task.train is not None
        assert all(row["text"] == f"text {row['row']}" for row in task.train)
        assert len(task.evaluation[""]) == 40
        return task.train["row"][:]

    numbers = sample(seed=1)
    assert len(set(numbers)) == 10
    assert sorted(numbers) != list(range(10))
    assert sample(seed=1) == numbers
    assert set(sample(seed=2)) != set(numbers)
    assert sorted(sample(seed=1, count=100)) == list(range(40))


def test_mnli_has_two_evaluation_splits(tmp_path: Path) -> None:
    def pairs(*labels: int) -> list[Row]:
        return [{"premise": "p", "hypothesis": "h", "label": label} for label in labels]

    path = folder(
        tmp_path,
        train=pairs(0, 1, 2),
        validation_matched=pairs(0, 1),
        validation_mismatched=pairs(2, 2, 2),
        test=pairs(1),
    )
    task = read(path, "mnli")
    assert {suffix: part["label"][:] for suffix, part in task.evaluation.items()} == {
        "": [0, 1],
        "_mismatched": [2, 2, 2],
    }
    alone = read(path, "mnli", split="validation_mismatched")
    assert {suffix: len(part) for suffix, part in alone.evaluation.items()} == {"": 3}
    (tmp_path / "validation_mismatched.jsonl").unlink()
    assert "no split 'validation'; there is test, train, validation_matched" in refusal(
        path, "mnli"
    )


# Columns and values


def test_a_missing_column_lists_those_there_are(tmp_path: Path) -> None:
    path = folder(tmp_path, train=rows(0, 1), validation=rows(0))
    assert refusal(path, "rte") == (
        "data: the validation split has no column 'sentence1'; it has sentence, label"
    )
    assert refusal(path, label="mark") == (
        "data: the validation split has no column 'mark'; it has sentence, label"
    )
    assert refusal(path, "custom", text=["sentence"], label="mark") == (
        "data: the train split has no column 'mark'; it has sentence, label"
    )


def test_columns_may_be_named(tmp_path: Path) -> None:
    named = rows(0, 1, key="review", label="stars")
    path = folder(tmp_path, train=named, validation=named)
    task = read(path, "sst2", text=["review"], label="stars", metrics=["f1", "matthews"])
    assert task.train is not None
    assert task.train["text"][:] == ["text 0", "text 1"]
    assert task.metrics == ("f1", "matthews", "loss")


def test_two_text_columns_keep_their_order(tmp_path: Path) -> None:
    pairs = [{"b": f"b{at}", "a": f"a{at}", "label": at % 2} for at in range(3)]
    path = folder(tmp_path, train=pairs, validation=pairs)
    task = read(path, "sst2", text=["a", "b"])
    assert task.train is not None
    assert task.train.column_names == ["text", "pair", "label", "row"]
    assert task.train["text"][:] == ["a0", "a1", "a2"]
    assert task.train["pair"][:] == ["b0", "b1", "b2"]


def test_labels_outside_the_range_are_refused_with_their_rows(tmp_path: Path) -> None:
    path = folder(tmp_path, train=rows(0, 2, 1, -1, None), validation=rows(0))
    assert refusal(path) == (
        "data: the train split has labels outside {0: 'negative', 1: 'positive'}: 3 rows, "
        "such as row 1 (2), 3 (-1), 4 (None), counted from 0"
    )
    many = folder(tmp_path / "many", train=rows(0, 1), validation=rows(*[-1] * 1200))
    assert refusal(many) == (
        "data: the validation split has labels outside {0: 'negative', 1: 'positive'}: 1,200 rows, "
        "such as row 0 (-1), 1 (-1), 2 (-1), 3 (-1), 4 (-1), counted from 0"
    )


def test_rows_are_named_by_their_number_in_the_source(tmp_path: Path) -> None:
    path = folder(tmp_path, train=rows(*[0, 1] * 10, 7), validation=rows(0))
    whole = refusal(path, holdout=0.1, max_train_rows=21, seed=4)
    assert "1 rows, such as row 20 (7)" in whole


def test_labels_that_are_all_equal_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, train=rows(1, 1, 1), validation=rows(0, 0))
    assert refusal(path) == (
        f"{path}: all 3 training rows have the label positive; nothing can be learnt from them"
    )
    assert read(path, "sst2", train=False).evaluation[""]["label"][:] == [0, 0]


def test_missing_text_is_refused(tmp_path: Path) -> None:
    broken = [{"sentence1": "a", "sentence2": text, "label": 0} for text in ("b", None, "c", None)]
    path = folder(tmp_path, train=broken, validation=broken[:1])
    assert refusal(path, "rte") == (
        "data: the train split has text in 'sentence2' is missing: 2 rows, such as row 1, 3, "
        "counted from 0"
    )


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_targets_that_are_not_finite_are_refused(tmp_path: Path, wrong: float) -> None:
    pairs = [{"sentence1": "a", "sentence2": "b", "label": value} for value in (1.5, wrong, 2.0)]
    path = folder(tmp_path, "parquet", train=pairs, validation=pairs[:1])
    assert refusal(path, "stsb") == (
        "data: the train split has targets that are not finite: 1 rows, such as row 1, "
        "counted from 0"
    )


@pytest.mark.parametrize("wrong", [None, "much"])
def test_targets_that_are_no_numbers_are_refused(tmp_path: Path, wrong: Any) -> None:
    first = "little" if wrong == "much" else 1.0
    pairs = [{"sentence1": "a", "sentence2": "b", "label": value} for value in (first, wrong)]
    fine = [{"sentence1": "a", "sentence2": "b", "label": 1.0}]
    path = folder(tmp_path, train=pairs, validation=fine)
    rows = "2 rows, such as row 0, 1" if wrong == "much" else "1 rows, such as row 1"
    said = f"data: the train split has targets that are no numbers: {rows}, counted from 0"
    assert refusal(path, "stsb") == said


def test_regression_has_real_targets_and_one_output(tmp_path: Path) -> None:
    pairs = [{"sentence1": "a", "sentence2": "b", "label": value} for value in (1, 2.5)]
    task = read(folder(tmp_path, train=pairs, validation=pairs), "stsb")
    assert task.train is not None
    assert (task.labels, task.width, task.metrics) == (None, 1, ("pearson", "spearman", "loss"))
    assert task.train["label"][:] == [1.0, 2.5]


def test_a_regression_is_not_scored_as_classes(tmp_path: Path) -> None:
    marks = rows(0.5, 1.5, key="words", label="mark")
    path = folder(tmp_path, train=marks, validation=marks)
    said = "data.metrics: accuracy is a metric of classes, and 'mark' holds numbers to predict; use"
    with pytest.raises(SiftError, match=f"^{said} pearson, spearman, mae, rmse, r2, loss$"):
        custom(path, metrics=["pearson", "accuracy"])


@pytest.mark.parametrize(("mark", "fitting"), [(0.5, "pearson, spearman"), ("a", "accuracy, bal")])
def test_labelled_rows_are_not_scored_as_tokens(tmp_path: Path, mark: Any, fitting: str) -> None:
    marks = rows(mark, mark * 2, key="words", label="mark")
    path = folder(tmp_path, train=marks, validation=marks)
    said = f"^data.metrics: perplexity is a metric of tokens of a language model, .*; use {fitting}"
    with pytest.raises(SiftError, match=said):
        custom(path, metrics=["loss", "perplexity"])


def test_string_labels_are_mapped_to_the_codes_of_the_task(tmp_path: Path) -> None:
    pairs = [
        {"sentence1": "a", "sentence2": "b", "label": name}
        for name in ("not_entailment", "entailment", "not_entailment")
    ]
    for task, codes in (("rte", [1, 0, 1]), ("wnli", [0, 1, 0])):
        train = read(folder(tmp_path, train=pairs, validation=pairs), task).train
        assert train is not None
        assert train["label"][:] == codes


@pytest.mark.parametrize(
    ("marks", "labels", "codes"),
    [
        (("warm", "cold", "warm"), ("cold", "warm"), [1, 0, 1]),
        ((0, 3, 1), ("0", "1", "3"), [0, 2, 1]),
        ((5, 1, 3), ("1", "3", "5"), [2, 0, 1]),
        ((1, -1, 1), ("-1", "1"), [1, 0, 1]),
        ((True, False, True), ("0", "1"), [1, 0, 1]),
        ((0.5, 1.0, -2.0), None, [0.5, 1.0, -2.0]),
    ],
    ids=["strings", "integers", "stars", "signs", "booleans", "floats"],
)
def test_a_custom_task_takes_its_labels_from_the_training_rows(
    tmp_path: Path, marks: tuple[Any, ...], labels: tuple[str, ...] | None, codes: list[Any]
) -> None:
    train = rows(*marks, key="words", label="mark")
    task = custom(folder(tmp_path, train=train, validation=train[:1]))
    assert task.train is not None
    assert task.labels == labels
    assert task.train["label"][:] == codes
    assert task.evaluation[""]["label"][:] == codes[:1]
    assert task.metrics == (
        "pearson" if labels is None else "accuracy",
        "spearman" if labels is None else "f1_macro",
        "loss",
    )


def test_a_custom_task_takes_its_labels_from_a_class_label(tmp_path: Path) -> None:
    features = datasets.Features(
        words=datasets.Value("string"), mark=datasets.ClassLabel(names=["warm", "cold", "mild"])
    )
    table = datasets.Dataset.from_dict({"words": ["a", "b"], "mark": [1, 0]}, features=features)
    for split in ("train", "validation"):
        table.to_parquet(tmp_path / f"{split}.parquet")
    task = custom(str(tmp_path))
    assert task.labels == ("warm", "cold", "mild")
    assert task.train is not None
    assert task.train["label"][:] == [1, 0]


def test_labels_that_are_given_come_in_code_order(tmp_path: Path) -> None:
    train = rows("warm", "cold", key="words", label="mark")
    path = folder(tmp_path, train=train, validation=train)
    task = custom(path, labels=["warm", "mild", "cold"])
    assert task.labels == ("warm", "mild", "cold")
    assert task.train is not None
    assert task.train["label"][:] == [0, 2]
    with pytest.raises(SiftError, match=r"outside \{0: 'warm', 1: 'hot'\}: 1 rows, .* 1 \('cold'"):
        custom(path, labels=["warm", "hot"])
    stars = rows(5, 1, key="words", label="mark")
    task = custom(folder(tmp_path / "stars", train=stars, validation=stars), labels=["5", "3", "1"])
    assert task.train is not None
    assert task.train["label"][:] == [0, 2]


def test_a_label_that_only_the_evaluation_split_has_is_refused(tmp_path: Path) -> None:
    train = rows("warm", "cold", key="words", label="mark")
    strange = rows("warm", "mild", key="words", label="mark")
    path = folder(tmp_path, train=train, validation=strange)
    said = r"the validation split has labels outside \{0: 'cold', 1: 'warm'\}: .* row 1 \('mild'\)"
    with pytest.raises(SiftError, match=said):
        custom(path)


def test_text_that_looks_like_numbers_stays_text(tmp_path: Path) -> None:
    numbers = [{"words": 12, "mark": "a"}, {"words": 7, "mark": "b"}]
    task = custom(folder(tmp_path, "csv", train=numbers, validation=numbers))
    assert task.train is not None
    assert task.train["text"][:] == ["12", "7"]


# Tasks


def test_glue_tasks_have_the_official_columns_labels_and_metrics() -> None:
    expected = {  # the label order of nyu-mll/glue, the metrics of Wang et al. (2019), table 1
        "cola": ("sentence", "unacceptable acceptable", "matthews"),
        "sst2": ("sentence", "negative positive", "accuracy"),
        "mrpc": ("sentence1 sentence2", "not_equivalent equivalent", "accuracy f1"),
        "qqp": ("question1 question2", "not_duplicate duplicate", "accuracy f1"),
        "stsb": ("sentence1 sentence2", None, "pearson spearman"),
        "mnli": ("premise hypothesis", "entailment neutral contradiction", "accuracy"),
        "qnli": ("question sentence", "entailment not_entailment", "accuracy"),
        "rte": ("sentence1 sentence2", "entailment not_entailment", "accuracy"),
        "wnli": ("sentence1 sentence2", "not_entailment entailment", "accuracy"),
    }
    found = {
        name: (
            " ".join(task.text),
            None if task.labels is None else " ".join(task.labels),
            " ".join(task.metrics),
        )
        for name, task in TASKS.items()
    }
    assert found == expected
    assert {task.label for task in TASKS.values()} == {"label"}


# Tokens

SENTENCE = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)


def source(texts: Sequence[str], pairs: Sequence[str] | None = None) -> datasets.Dataset:
    columns: dict[str, Any] = {"text": list(texts)}
    if pairs is not None:
        columns["pair"] = list(pairs)
    numbers = [100 - at for at in range(len(texts))]
    return datasets.Dataset.from_dict({**columns, "label": [0] * len(texts), "row": numbers})


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=6),
    st.booleans(),
    st.integers(3, 16),
)
def test_truncation_is_counted_exactly(
    texts: list[tuple[str, str]], paired: bool, longest: int
) -> None:
    first, second = [one for one, _ in texts], [two for _, two in texts]
    encoded = encode(source(first, second if paired else None), tiny_tokenizer(), longest)
    words = [len(a.split()) + (len(b.split()) + 1 if paired else 0) for a, b in texts]
    whole = [count + 2 for count in words]  # [CLS] and [SEP]; one token per word
    assert encoded.lengths == [min(length, longest) for length in whole]
    assert encoded.truncated == sum(length > longest for length in whole)
    assert [len(ids) for ids in encoded.rows["input_ids"]] == encoded.lengths


def test_a_pair_is_cut_at_its_longer_text() -> None:
    encoded = encode(source(["good bad fine dull bright"], ["slow"]), tiny_tokenizer(), 6)
    expected = ["[CLS]", "good", "bad", "[SEP]", "slow", "[SEP]"]
    assert encoded.rows["input_ids"][0] == [VOCABULARY[word] for word in expected]


def test_encoded_rows_keep_labels_and_row_numbers() -> None:
    given = datasets.Dataset.from_dict(
        {"text": ["good", "bad fine", "dull"], "label": [2, 0, 1], "row": [7, 30, 5]}
    )
    encoded = encode(given, tiny_tokenizer(), 8)
    assert len(encoded) == 3
    assert encoded.lengths == [3, 4, 3]
    assert encoded.numbers([2, 0]) == [5, 7]
    cls, sep = VOCABULARY["[CLS]"], VOCABULARY["[SEP]"]
    assert encoded.take([1, 0]) == [
        {
            "input_ids": [cls, VOCABULARY["bad"], VOCABULARY["fine"], sep],
            "attention_mask": [1, 1, 1, 1],
            "label": 0,
        },
        {"input_ids": [cls, VOCABULARY["good"], sep], "attention_mask": [1, 1, 1], "label": 2},
    ]


def test_tokens_of_many_rows_are_kept_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(tokens, "CACHED_FROM", 2)
    calls = []
    plain = PreTrainedTokenizerFast.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)

    def encoded(texts: Sequence[str], length: int = 8) -> list[Any]:
        calls.clear()
        return encode(source(texts), tiny_tokenizer(), length).take(range(len(texts)))

    first = encoded(["good bad", "fine"])
    assert calls
    assert encoded(["good bad", "fine"]) == first
    assert not calls
    (file,) = (tmp_path / "sift-tokens").iterdir()
    for other in (["good bad", "dull"], ["good", "bad fine"]):  # the same bytes, cut elsewhere
        assert encoded(other) != first
        assert calls
    assert encoded(["good bad", "fine"], 3) != first
    file.write_bytes(file.read_bytes()[:50])
    assert encoded(["good bad", "fine"]) == first
    assert calls
    assert encoded(["good bad", "fine"]) == first
    assert not calls
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", file)  # no folder: it cannot be kept
    assert encoded(["good bad", "fine"]) == first


def test_a_length_without_room_for_text_is_refused() -> None:
    said = "^data.max_length: 2 tokens leave no room for any text$"
    with pytest.raises(SiftError, match=said):
        encode(source(["good bad"], ["fine"]), tiny_tokenizer(), 2)


# The set that comes with sift


@pytest.fixture(scope="module")
def reviews() -> dict[str, list[Row]]:
    texts = {name: BUILTIN / "reviews" / f"{name}.jsonl" for name in ("train", "validation")}
    return {
        name: [json.loads(line) for line in path.read_text(encoding="utf-8").strip().split("\n")]
        for name, path in texts.items()
    }


def words_of(sentence: str) -> tuple[str, ...]:
    return tuple(re.sub(r"[^\w\s]", "", sentence.lower()).split())


def test_reviews_load_as_sst2(reviews: dict[str, list[Row]]) -> None:
    task = read("builtin:reviews", "sst2")
    assert task.train is not None
    for split, part in (("train", task.train), ("validation", task.evaluation[""])):
        assert part["text"][:] == [row["sentence"] for row in reviews[split]]
        assert part["label"][:] == [row["label"] for row in reviews[split]]


def test_reviews_are_many_and_balanced(reviews: dict[str, list[Row]]) -> None:
    for split, least in (("train", 1200), ("validation", 400)):
        count = Counter(row["label"] for row in reviews[split])
        assert set(count) == {0, 1}
        assert count[0] == count[1]
        assert count.total() >= least
        assert [row["idx"] for row in reviews[split]] == list(range(count.total()))


def test_no_review_occurs_twice(reviews: dict[str, list[Row]]) -> None:
    every = [words_of(row["sentence"]) for split in reviews.values() for row in split]
    assert [words for words, count in Counter(every).items() if count > 1] == []


def test_the_splits_of_the_reviews_share_no_run_of_six_words(
    reviews: dict[str, list[Row]],
) -> None:
    runs = {
        split: {
            words[start : start + 6]
            for words in (words_of(row["sentence"]) for row in part)
            for start in range(len(words) - 5)
        }
        for split, part in reviews.items()
    }
    assert len(runs["train"]) > 5000
    assert runs["train"] & runs["validation"] == set()


def test_codes_of_a_class_label_follow_its_names_not_its_order(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset

    rows = Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [0, 1, 1]})
    rows = rows.cast_column("label", ClassLabel(names=["positive", "negative"]))
    for split in ("train", "validation"):
        rows.to_parquet(tmp_path / f"{split}.parquet")
    task = read(str(tmp_path), "sst2")
    assert task.train is not None
    assert list(task.train["label"]) == [1, 0, 0]


def test_a_class_label_of_other_names_is_refused_with_both_lists(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"t": ["a", "b"], "y": [0, 1]})
    rows = rows.cast_column("y", datasets.ClassLabel(names=["Warm", "cold"]))
    for split in ("train", "validation"):
        rows.to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(SiftError, match=r"called \[Warm, cold\], and those of the task \[x, y\]"):
        read(str(tmp_path), "custom", text=["t"], label="y", labels=["x", "y"])
    task = read(str(tmp_path), "custom", text=["t"], label="y", labels=["COLD", "warm"])
    assert task.train is not None
    assert list(task.train["label"]) == [1, 0]


def test_a_column_of_ids_is_not_taken_for_labels(tmp_path: Path) -> None:
    lines = "\n".join(f'{{"t": "x", "y": {code}}}' for code in (5, 10**12))
    (tmp_path / "train.jsonl").write_text(lines)
    (tmp_path / "validation.jsonl").write_text(lines)
    with pytest.raises(SiftError, match=r"name them in data\.labels, or write 3\.0 for 3 where"):
        read(str(tmp_path), "custom", text=["t"], label="y")


def test_whole_numbers_outside_the_labels_come_with_what_they_mean(tmp_path: Path) -> None:
    for split, last in (("train", 2), ("validation", 3)):
        write(tmp_path / f"{split}.csv", [{"t": "x", "y": code} for code in (0, 1, last)])
    with pytest.raises(SiftError, match=r"labels outside .*codes of classes; 3\.0 is a number"):
        read(str(tmp_path), "custom", text=["t"], label="y")
