"""`sift predict --input`: rows in, the same rows with what the model says of each out."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sift_cli
from sift_cli.recipe import load_recipe
from sift_cli.runs import bulk
from sift_cli.training import train
from tests.support.command import Done, sift
from tests.support.models import WORDS, save_base, tiny_model, tiny_tokenizer
from tests.support.rows import write_rows

NAMES = ["negative", "positive"]
RECIPE = """\
model: {{path: {base}}}
data: {{path: {data}, task: {task}, max_length: 16{more}}}
selection: {{density: 0.05}}
train: {{max_steps: 6, batch_size: 8, learning_rate: 0.01}}
log: {{report: false}}
"""


def trained(place: Path, task: str, data: Path, more: str = "") -> Path:
    recipe = place / "r.yaml"
    base = save_base(place / "base")
    recipe.write_text(RECIPE.format(base=base, data=data, task=task, more=more))
    train(load_recipe(recipe), place / "run")
    return place / "run"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on SST-2's columns."""
    place = tmp_path_factory.mktemp("tuned")
    (place / "data").mkdir()
    write_rows(place / "data/train.jsonl", 48, seed=1)
    write_rows(place / "data/validation.jsonl", 16, seed=2)
    return trained(place, "sst2", place / "data")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """25 rows, more than four windows of six."""
    write_rows(tmp_path / "in.jsonl", 25, seed=3)
    return tmp_path / "in.jsonl"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "WINDOW", 6)


def predict(tuned: Path, source: object, output: object, *more: object) -> Done:
    return sift("predict", tuned, "--input", source, "--output", output, "--device", "cpu", *more)


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def cells(path: Path, delimiter: str) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def parquet(path: Path) -> list[dict[str, Any]]:
    from pyarrow.parquet import read_table

    rows: list[dict[str, Any]] = read_table(path).to_pylist()
    return rows


def test_ten_thousand_rows_are_right_as_often_as_eval_says(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    source, out = tmp_path / "in.csv", tmp_path / "out.jsonl"
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(1, len(WORDS), (10_000, 3), generator=generator).tolist()
    texts = [" ".join(WORDS[code] for code in some[: 1 + at % 3]) for at, some in enumerate(codes)]
    lines = [f"{at},{text},{at % 2}" for at, text in enumerate(texts)]
    source.write_text("\n".join(["id,sentence,label", *lines]) + "\n")
    done = predict(tuned, source, out)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = jsonl(out)
    assert [(one["id"], one["sentence"], one["label"]) for one in found] == [
        (str(at), text, str(at % 2)) for at, text in enumerate(texts)
    ]
    assert all(list(one["probabilities"]) == NAMES for one in found)
    assert all(abs(sum(one["probabilities"].values()) - 1) < 1e-6 for one in found)
    right = sum(one["prediction"] == NAMES[int(one["label"])] for one in found) / len(found)
    assert 0 < right < 1
    scored = sift("eval", tuned, "--data", source, "--device", "cpu", "--json")
    assert right == json.loads(scored.stdout)["metrics"]["accuracy"]


@pytest.mark.parametrize("came", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("goes", ["jsonl", "csv", "tsv", "parquet"])
def test_every_format_becomes_every_other(
    tuned: Path, tmp_path: Path, came: str, goes: str
) -> None:
    import pyarrow
    from pyarrow import parquet as files

    texts = ["007", "None", 'a "quoted", cell', "two\nlines", "a\ttab", "é ü", "good film", " x "]
    given = [{"sentence": text, "n": at, "more": None} for at, text in enumerate(texts)]
    source, out = tmp_path / f"in.{came}", tmp_path / f"out.{goes}"
    if came == "parquet":
        files.write_table(pyarrow.Table.from_pylist(given), source)
    elif came == "jsonl":
        source.write_text("".join(json.dumps(one) + "\n" for one in given))
    else:
        with source.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(given[0]), delimiter="\t" if came == "tsv" else ",")
            writer.writeheader()
            writer.writerows(given)
    if came == "tsv":  # GLUE's own files quote nothing
        given = [
            one for one in given if '"' not in one["sentence"] and one["sentence"].isprintable()
        ]
        source.write_text(
            "sentence\tn\tmore\n" + "".join(f"{x['sentence']}\t{x['n']}\t\n" for x in given)
        )
    done = predict(tuned, source, out)
    assert (done.returncode, done.stderr) == (0, "")
    found = {
        "jsonl": jsonl,
        "parquet": parquet,
        "csv": lambda path: cells(path, ","),
        "tsv": lambda path: cells(path, "\t"),
    }[goes](out)
    as_text = came in ("csv", "tsv") or goes in ("csv", "tsv")
    empty = "" if goes in ("csv", "tsv") else None
    for one, own in zip(found, given, strict=True):
        assert list(one) == ["sentence", "n", "more", "prediction", "probabilities"]
        assert (one["sentence"], one["more"]) == (own["sentence"], empty)
        assert one["n"] == (str(own["n"]) if as_text else own["n"])
        said = one["probabilities"]
        probabilities = json.loads(said) if isinstance(said, str) else said
        assert list(probabilities) == NAMES
        assert one["prediction"] == max(probabilities, key=probabilities.__getitem__)


def test_stdin_to_stdout_is_json_lines_alone(tuned: Path, rows: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sift_cli", "predict", str(tuned), "--input", "-"]
    piped = subprocess.run(command, input=rows.read_bytes(), capture_output=True, check=False)
    assert (piped.returncode, piped.stderr) == (0, b"")
    assert predict(tuned, rows, tmp_path / "out.jsonl").returncode == 0
    said = [json.loads(line) for line in piped.stdout.splitlines()]
    assert [one["prediction"] for one in said] == [
        one["prediction"] for one in jsonl(tmp_path / "out.jsonl")
    ]
    assert [one["sentence"] for one in said] == [one["sentence"] for one in jsonl(rows)]


def test_an_error_of_stdin_says_so(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"sentence": "a"}\n{"sent')))
    done = sift("predict", tuned, "--input", "-", "--output", "-")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("--input -:2: not JSON")


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv"])
@pytest.mark.parametrize("cut_at", [0, 5, -1, -7])
def test_an_output_that_was_broken_off_is_gone_on_with(
    tuned: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
    cut_at: int,
) -> None:
    whole, out = tmp_path / f"whole.{ending}", tmp_path / f"out.{ending}"
    assert predict(tuned, rows, whole).returncode == 0
    answers, calls = bulk.Lines.line, []

    def broken(self: bulk.Lines, row: dict[str, Any], ascii: bool = False) -> str:
        calls.append(row)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return answers(self, row, ascii)

    with monkeypatch.context() as patch:
        patch.setattr(bulk.Lines, "line", broken)
        done = predict(tuned, rows, out)
    assert done.returncode == 130
    assert f"{out} holds 12 of 25 rows; --resume goes on with it" in done.stderr
    assert whole.read_bytes().startswith(out.read_bytes())
    if cut_at:  # as if the process had died while it wrote
        out.write_bytes(out.read_bytes()[:cut_at])
    asked: list[int] = []
    ask = bulk.windows

    def counting(some: Any) -> Any:
        for window in ask(some):
            asked.append(len(window))
            yield window

    monkeypatch.setattr(bulk, "windows", counting)
    assert predict(tuned, rows, out, "--resume").returncode == 0
    assert [line[:40] for line in out.read_text().splitlines()] == [
        line[:40] for line in whole.read_text().splitlines()
    ]
    assert sum(asked) == {0: 13, 5: 25}.get(cut_at, 14)
    again = predict(tuned, rows, out, "--resume")
    assert (again.returncode, sum(asked)) == (0, {0: 13, 5: 25}.get(cut_at, 14))


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_resume_refuses_other_rows(tuned: Path, rows: Path, tmp_path: Path, ending: str) -> None:
    out, other = tmp_path / f"out.{ending}", tmp_path / "other.jsonl"
    assert predict(tuned, rows, out).returncode == 0
    held, lines = out.read_bytes(), rows.read_text().splitlines()
    changed = [*lines[:4], lines[4].replace('"label": 0', '"label": 7'), *lines[5:]]
    for some, said in (
        (changed, "row 4, counted from 0, is not that of the input"),
        (lines[:20], "holds more than the 20 rows of the input"),
    ):
        other.write_text("\n".join(some) + "\n")
        done = predict(tuned, other, out, "--resume")
        assert done.returncode == 2
        assert said in done.stderr
        assert out.read_bytes() == held


def test_files_and_options_that_are_no_good(tuned: Path, rows: Path, tmp_path: Path) -> None:
    there, new = tmp_path / "there.csv", tmp_path / "new.jsonl"
    there.write_text("kept")
    for args, said in (
        ((rows,), f"{rows} is a file, not a text; for its rows say --input {rows}"),
        (("--input", rows, "--output", rows), f"--output {rows}: it is the input"),
        (("--input", rows, "--output", rows, "--resume"), f"--output {rows}: it is the input"),
        (("--input", rows, "--output", there), "exists already; choose another, or go on"),
        (("--input", rows, "--output", "a.xlsx"), "must end in .csv or .tsv or .jsonl or .parquet"),
        (("--input", "a.xlsx"), "use one of .csv, .tsv, .jsonl, .parquet"),
        (("--input", "no.csv"), "--input no.csv: no such file"),
        (("--input", rows, "--resume"), "--resume: say with which --output"),
        (("--input", rows, "--output", "-", "--resume"), "--resume: what stdout got"),
        (("--input", rows, "--output", "a.parquet", "--resume"), "--resume: Parquet is written"),
        (("--input", rows, "--pair", "a"), "pairs of --input are in its columns"),
        (("a", "--output", new), "they are for the rows of --input"),
    ):
        done = sift("predict", tuned, *args)
        assert (done.returncode, done.stdout) == (2, ""), said
        assert said in done.stderr
    assert there.read_text() == "kept"
    assert not new.exists()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "text,label\na,1\n", "no column 'sentence'; it has text, label"),
        ("a.csv", "sentence,prediction\na,1\n", "has a column 'prediction', as what is predicted"),
        (
            "a.csv",
            "sentence,n\na,1\n,2\n,3\n",
            "text in 'sentence' is missing: 2 rows, such as row 1, 2",
        ),
        ("a.csv", "sentence\n", "it holds no rows"),
        ("a.csv", "sentence\na,b\n", ":2: 2 cells, but 1 columns"),
        ("a.csv", 'sentence\na\n"b', ":3: unexpected end of data"),
        ("a.jsonl", "", "it holds no rows"),
        ("a.jsonl", '{"sentence": "a"}\n[]\n', ":2: not a row"),
        ("a.jsonl", '{"sentence": "a"}\n{"x": 1}\n', "text in 'sentence' is missing: 1 rows"),
        ("a.jsonl", '{"sentence": ["a"]}\n', "lists or objects in 'sentence' where text belongs"),
        ("a.jsonl", '{"sentence": "\\ud800"}\n', ":1: not UTF-8"),
        ("a.parquet", "no parquet", "cannot be read"),
    ],
)
def test_rows_that_are_no_good_are_told_before_any_is_scored(
    tuned: Path, tmp_path: Path, name: str, text: str, said: str
) -> None:
    source, out = tmp_path / name, tmp_path / "out.jsonl"
    source.write_text(text)
    done = predict(tuned, source, out)
    assert done.returncode == 2
    assert done.stderr.startswith(f"--input {source}")
    assert said in done.stderr
    assert not out.exists()


def test_rows_of_no_one_kind_fit_no_parquet(tuned: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out.parquet"
    source.write_text('{"sentence": "a", "n": 1}\n' * 7 + '{"sentence": "b", "n": "one"}\n')
    done = predict(tuned, source, out)
    assert done.returncode == 2
    assert "the rows fit no Parquet file" in done.stderr
    assert list(tmp_path.glob("out*")) == []
    source.write_text('{"sentence": "a", "n": 1}\n' * 7 + '{"sentence": "b", "m": [1.5]}\n')
    assert predict(tuned, source, out).returncode == 0
    last = parquet(out)[-1]
    assert (last["n"], last["m"], last["sentence"]) == (None, [1.5], "b")


def test_texts_that_are_cut_are_counted(tuned: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    rows = [{"sentence": "good film " * (20 if at % 3 == 0 else 1)} for at in range(8)]
    source.write_text("\n".join(map(json.dumps, rows)))
    done = predict(tuned, source, tmp_path / "out.jsonl")
    assert (done.returncode, done.stderr) == (0, "3 of 8 rows were cut to 16 tokens\n")
    asked = sift("predict", tuned, "good film " * 20, "--json")
    assert asked.stderr == "1 of 1 rows were cut to 16 tokens\n"
    (said,) = json.loads(asked.stdout)["predictions"]
    assert said["probability"] == pytest.approx(max(said["probabilities"].values()))
    assert list(said["probabilities"]) == NAMES


def test_from_python(tuned: Path, rows: Path, tmp_path: Path) -> None:
    run, out = sift_cli.Run.load(tuned), tmp_path / "out.jsonl"
    run.predict_file(rows, out, device="cpu", quiet=True)
    found = jsonl(out)
    alone = run.predict([one["sentence"] for one in found], device="cpu")
    assert [one["prediction"] for one in found] == [one["label"] for one in alone]
    for one, other in zip(found, alone, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
    with pytest.raises(sift_cli.SiftError, match="exists already"):
        run.predict_file(rows, out)
    out.write_bytes(out.read_bytes()[:-1])
    run.predict_file(rows, out, resume=True, device="cpu", quiet=True)
    assert [one["prediction"] for one in jsonl(out)] == [one["prediction"] for one in found]


def own_rows(make: Callable[[int], dict[str, Any]]) -> str:
    return "".join(json.dumps(make(at)) + "\n" for at in range(24))


def test_pairs_under_the_names_of_glues_own_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 24, seed=1, pair=True)
    renamed = [
        {"sentence1": one["sentence"], "sentence2": one["other"], "label": one["label"]}
        for one in jsonl(tmp_path / "rows.jsonl")
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, renamed)))
    tuned = trained(tmp_path, "mrpc", data, ", holdout: 0.3")
    source = tmp_path / "dev.tsv"
    lines = [f"{one['sentence1']}\t{one['sentence2']}" for one in renamed]
    source.write_text("\n".join(["#1 String\t#2 String", *lines]) + "\n")
    assert predict(tuned, source, tmp_path / "a.jsonl").returncode == 0
    assert predict(tuned, data, tmp_path / "b.jsonl").returncode == 0
    a, b = jsonl(tmp_path / "a.jsonl"), jsonl(tmp_path / "b.jsonl")
    assert [one["probabilities"] for one in a] == [one["probabilities"] for one in b]
    assert list(a[0]) == ["#1 String", "#2 String", "prediction", "probabilities"]
    swapped = [one | {"sentence2": "bad"} for one in renamed]
    data.write_text("\n".join(map(json.dumps, swapped)))
    assert predict(tuned, data, tmp_path / "c.jsonl").returncode == 0
    assert [x["probabilities"] for x in jsonl(tmp_path / "c.jsonl")] != [
        x["probabilities"] for x in b
    ]


def test_numbers(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(own_rows(lambda at: {"text": WORDS[at % 9 + 1], "label": at / 7}))
    tuned = trained(tmp_path, "custom", data, ", text: text, label: label, holdout: 0.3")
    for name, read in (("out.parquet", parquet), ("out.jsonl", jsonl)):
        assert predict(tuned, data, tmp_path / name).returncode == 0
        found = read(tmp_path / name)
        assert list(found[0]) == ["text", "label", "value"]
        asked = sift("predict", tuned, *(one["text"] for one in found), "--device", "cpu", "--json")
        alone = [one["score"] for one in json.loads(asked.stdout)["predictions"]]
        assert [one["value"] for one in found] == pytest.approx(alone, abs=1e-6)


def test_several_labels(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    names = ("a", "b", "c")
    data.write_text(
        own_rows(lambda at: {"text": WORDS[at % 9 + 1], "label": list(names[: at % 4])})
    )
    tuned = trained(tmp_path, "custom", data, ", text: text, label: label, holdout: 0.3")
    for name, read in (("out.parquet", parquet), ("out.jsonl", jsonl)):
        assert predict(tuned, data, tmp_path / name).returncode == 0
        for one in read(tmp_path / name):
            likely = [label for label, value in one["probabilities"].items() if value > 0.5]
            assert (list(one["probabilities"]), one["prediction"]) == ([*names], likely)


def test_words_and_texts_to_tag(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(
        own_rows(
            lambda at: {
                "tokens": [WORDS[at % 9 + 1], "good", "film"],
                "tags": ["O", "B-X" if at % 2 else "O", "I-X" if at % 2 else "O"],
            }
        )
    )
    tuned = trained(tmp_path, "tags", data, ", holdout: 0.3")
    for name, read in (("out.parquet", parquet), ("out.jsonl", jsonl)):
        assert predict(tuned, data, tmp_path / name).returncode == 0
        found = read(tmp_path / name)
        assert list(found[0]) == ["tokens", "tags", "prediction", "entities"]
        assert all(len(one["prediction"]) == 3 for one in found)
    texts = tmp_path / "texts.csv"
    texts.write_text("tokens\n" + "".join(" ".join(one["tokens"]) + "\n" for one in found))
    assert predict(tuned, texts, tmp_path / "texts.jsonl").returncode == 0
    same = jsonl(tmp_path / "texts.jsonl")
    assert [one["words"] for one in same] == [one["tokens"] for one in found]
    assert [one["prediction"] for one in same] == [one["prediction"] for one in found]


def test_a_model_without_a_recipe_reads_the_column_text(tmp_path: Path) -> None:
    tiny_model("bert", torch.float32, 2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    source, out = tmp_path / "a.csv", tmp_path / "out.csv"
    source.write_text("text\ngood film\n")
    assert predict(tmp_path / "model", source, out).returncode == 0
    assert cells(out, ",")[0]["prediction"] in ("LABEL_0", "LABEL_1")
