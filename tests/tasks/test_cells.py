"""Files of cells: the text that stands there, what parts it, GLUE's own files, saved folders."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import hypothesis.strategies as st
import pandas as pd
import pytest
from hypothesis import given

from sift_cli.errors import SiftError
from sift_cli.recipe import parse_recipe
from sift_cli.tasks.cells import Cells, read_cells
from sift_cli.tasks.classification import Classification
from sift_cli.tasks.labelled import load_task
from sift_cli.tasks.sources import Source

TEXTS = ["None", "null", "N/A", "007", "1e5", "NaN", "True", "12.50", "1_000", " a ", "#1, of 2"]
LABELS = ["a", "b"] * 5 + ["a"]
CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)


def load(path: Path, task: str = "custom", **more: Any) -> Classification:
    columns = {"text": ["text"], "label": "label"} if task == "custom" else {}
    source = {key: more.pop(key) for key in ("split", "cells") if key in more}
    return load_task(Source(str(path), task, **{"split": "train", **source}), **{**columns, **more})


def column(path: Path, name: str = "text", **more: Any) -> list[Any]:
    train = load(path, **more).train
    assert train is not None
    return list(train[name])


def refusal(path: Path, **more: Any) -> str:
    with pytest.raises(SiftError) as caught:
        load(path, **more)
    return str(caught.value)


def written(path: Path, labels: Sequence[Any], texts: Sequence[Any] | None = None) -> Path:
    rows = zip(texts or [f"t{at}" for at in range(len(labels))], labels, strict=True)
    table = pd.DataFrame(rows, columns=["text", "label"])
    table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


# Cells


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_a_cell_is_the_text_that_stands_there(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, LABELS, TEXTS)
    assert column(path) == TEXTS
    assert load(path).labels == ("a", "b")


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5), st.sampled_from(",;\t|"))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], delimiter: str
) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows([("one", "two"), *rows])
    path = tmp_path_factory.mktemp("cells") / "rows.csv"
    path.write_bytes(text.getvalue().encode())
    found = read_cells([path], Cells(), "custom")
    assert list(zip(found["one"], found["two"], strict=True)) == rows


def test_a_class_called_none(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", ["None", "favor", "None", "against"])
    assert load(path).labels == ("None", "against", "favor")


@pytest.mark.parametrize(
    ("labels", "names", "codes"),
    [
        ([0, 1, 0], ("0", "1"), [0, 1, 0]),
        ([0.5, 1, -2e3], None, [0.5, 1.0, -2000.0]),
        (["007", "010", "007"], ("007", "010"), [0, 1, 0]),
        ([0.0, 1.0, 1.0], ("0", "1"), [0, 1, 1]),
        ([3.0, 1.0, 2.0], None, [3.0, 1.0, 2.0]),
        (["nan", "b", "nan"], ("b", "nan"), [1, 0, 1]),
    ],
)
def test_labels_may_be_numbers(
    tmp_path: Path, labels: list[Any], names: tuple[str, ...] | None, codes: list[Any]
) -> None:
    path = written(tmp_path / "rows.csv", labels)
    assert (load(path).labels, column(path, "label")) == (names, codes)


def test_an_empty_cell_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,0\n,1\nb,\n")
    assert "text in 'text' is missing: 1 rows, such as row 1, counted from 0" in refusal(path)
    path.write_text("text,label\na,0\n\nc,1\nb\n")
    assert "labels outside {0: '0', 1: '1'}" in refusal(path)
    assert ": 1 rows, such as row 2 (None)" in refusal(path)


@pytest.mark.parametrize("form", ["csv", "parquet", "jsonl"])
def test_labels_made_floats_come_with_a_word(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"rows.{form}"
    rows = datasets.Dataset.from_dict({"text": list("abc"), "label": [0.0, 1.0, 0.0]})
    {"csv": rows.to_csv, "parquet": rows.to_parquet, "jsonl": rows.to_json}[form](path)
    task = load(path)
    assert task.labels == ("0", "1")
    (note,) = task.notes
    assert note.startswith("data.label: 'label' is 0.0 or 1.0: two classes;")
    number = load(path, metrics=["pearson"])
    assert (number.labels, number.notes) == (None, ())


# What parts cells


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'text{delimiter}label\n"a, b; c"{delimiter}x\nd{delimiter}y\n')
    assert column(path) == ["a, b; c", "d"]


def test_the_delimiter_may_be_given(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text~label\na~x\nb~y\n")
    assert refusal(path) == (
        "data: the train split has no column 'label'; it has text~label; if that is several, say "
        "what parts them with data.delimiter"
    )
    assert column(path, cells=Cells("~")) == ["a", "b"]
    said = "data.delimiter: it is for .csv and .tsv files, and "
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a", "label": "x"}\n')
    assert refusal(rows, cells=Cells("~")) == f"{said}{rows} holds none"


def test_the_recipe_says_how_cells_are_read() -> None:
    text = "model: {path: m}\ndata: {path: d, task: sst2, delimiter: tab, encoding: cp1252}"
    data = parse_recipe(text, "r.yaml").data
    assert (data.delimiter, data.encoding) == ("\t", "cp1252")
    for change, said in (("delimiter=ab", "give one character"), ("encoding=x", "no such enc")):
        with pytest.raises(SiftError, match=f"data.{change.partition('=')[0]}: {said}"):
            parse_recipe(text, "r.yaml", [f"data.{change}"])


def test_a_row_of_too_many_cells_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,x\none, two,y\n")
    said = f"data.path: {path}:3: 3 cells, but 2 columns; quote a cell that holds ',', or say what"
    assert refusal(path).startswith(said)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marks_tell_the_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\r\ncafé,x\r\nthé,y\r\n".encode(encoding))
    assert column(path) == ["café", "thé"]


def test_another_encoding_is_said_by_a_key(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\nok,x\ncafé,y\n".encode("cp1252"))
    assert refusal(path) == (
        f"data.path: {path}:3: not UTF-8 (byte 0xe9); say the file's encoding with data.encoding, "
        "such as cp1252"
    )
    assert column(path, cells=Cells(encoding="cp1252")) == ["ok", "café"]


# GLUE as it was downloaded

GLUE = {  # folder, task: header and two rows, then what they say
    "SST-2": ("sst2", 'sentence\tlabel\n"a "" film\t1\nbad\t0', '"a "" film', [1, 0]),
    "CoLA": ("cola", 'gj04\t1\t\tThe "sailors rode.\ngj04\t0\t*\tB', 'The "sailors rode.', [1, 0]),
    "MRPC": (
        "mrpc",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\ta\tb\n0\t2\t3\tc\td",
        "a",
        [1, 0],
    ),
    "QQP": (
        "qqp",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\ta\tb\t1\n1\t2\t3\tc\td\t0",
        "a",
        [1, 0],
    ),
    "STS-B": (
        "stsb",
        "index\tsentence1\tsentence2\tscore\n0\ta\tb\t5.000\n1\tc\td\t2.5",
        "a",
        [5.0, 2.5],
    ),
    "MNLI": (
        "mnli",
        "index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tneutral\n1\tc\td\tentailment",
        "a",
        [1, 0],
    ),
    "RTE": (
        "rte",
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n1\tc\td\tentailment",
        "a",
        [1, 0],
    ),
}


@pytest.mark.parametrize("name", GLUE)
def test_glue_as_it_was_downloaded(tmp_path: Path, name: str) -> None:
    task, rows, first, labels = GLUE[name]
    (tmp_path / name).mkdir()
    for split in ("train", "dev"):
        (tmp_path / name / f"{split}.tsv").write_text(rows + "\n", encoding="utf-8")
    (tmp_path / name / "dev_ids.tsv").write_text("1\t2\n")
    found = load(tmp_path, task, split="validation")
    for some in (found.train, found.evaluation[""]):
        assert some is not None
        assert (some["text"][0], list(some["label"])) == (first, labels)


# Folders that `datasets` saved


@pytest.mark.parametrize("parts", [("train",), ("train", "validation")])
def test_a_saved_folder_is_read(tmp_path: Path, parts: tuple[str, ...]) -> None:
    names = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["warm", "cold"])
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=names)
    (rows if len(parts) == 1 else datasets.DatasetDict(dict.fromkeys(parts, rows))).save_to_disk(
        tmp_path / "saved"
    )
    task = load(tmp_path / "saved", split=parts[-1])
    assert task.labels == ("warm", "cold")
    assert list(task.evaluation[""]["label"]) == [1, 0]


# What is no text, and no label


@pytest.mark.parametrize("text", [["a", "b"], {"en": "a"}])
def test_a_list_is_no_text(tmp_path: Path, text: Any) -> None:
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"text": [text, text], "label": ["x", "y"]}).to_parquet(path)
    said = "lists or objects in 'text' where text belongs: 2 rows, such as row 0, 1"
    assert said in refusal(path)


def test_an_object_is_no_label(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"text": ["a"], "label": [{"x": 1}]}).to_parquet(path)
    assert "lists or objects in 'label' where a label belongs" in refusal(path)
