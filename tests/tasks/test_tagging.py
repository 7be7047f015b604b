"""Words with a tag each: how they are read, cut into pieces, learnt, scored, kept and told."""

import json
from pathlib import Path
from typing import Any

import datasets
import hypothesis.strategies as st
import pytest
from hypothesis import given
from sklearn import metrics
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sift_cli.api import Run
from sift_cli.errors import SiftError
from sift_cli.recipe import load_recipe
from sift_cli.runs.session import open_session
from sift_cli.tasks.conll import read_conll
from sift_cli.tasks.entities import entities, entity_metrics, entity_scores, has_entities
from sift_cli.tasks.sources import Source
from sift_cli.tasks.tagged import load_tagging
from sift_cli.tasks.tagging import Tagging
from sift_cli.tasks.tokens import encode_words
from sift_cli.training.step import add_gradient
from tests.support.command import sift
from tests.support.models import WORDS, save_base

TAGS = ("B-THING", "I-THING", "O")

# Entities


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", []),
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("B-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),
        ("I-PER I-PER O I-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),  # IOB1: B where two touch
        ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),
        ("S-PER S-PER B-LOC I-LOC E-LOC", [("PER", 0, 1), ("PER", 1, 2), ("LOC", 2, 5)]),
        ("B-LOC E-LOC E-LOC I-LOC", [("LOC", 0, 2), ("LOC", 2, 3), ("LOC", 3, 4)]),
        ("U-PER B-A-B L-A-B", [("PER", 0, 1), ("A-B", 1, 3)]),
    ],
)
def test_entities_by_hand(tags: str, found: list[Any]) -> None:
    assert entities(tags.split()) == found


KINDS = st.sampled_from(["PER", "LOC", "ORG"])
PARTS = st.lists(st.tuples(KINDS | st.none(), st.integers(1, 3)), max_size=6)


@given(PARTS, st.booleans())
def test_entities_come_back_out_of_the_tags_they_were_written_in(
    parts: list[tuple[str | None, int]], scheme: bool
) -> None:
    tags: list[str] = []
    wanted = []
    for kind, length in parts:
        if kind is not None:
            wanted.append((kind, len(tags), len(tags) + length))
        ends = {0: "B", length - 1: "E"} if scheme else {0: "B"}
        alone = scheme and length == 1
        tags += [
            "O" if kind is None else f"{'S' if alone else ends.get(at, 'I')}-{kind}"
            for at in range(length)
        ]
    assert entities(tags) == wanted


def test_scores_by_hand() -> None:
    """The example of seqeval's own page: one entity of two is right."""
    truth = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    said = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    half = {"entity_precision": 0.5, "entity_recall": 0.5, "entity_f1": 0.5}
    assert entity_metrics(truth, said) == half
    misc, per = entity_scores(truth, said)
    assert (misc.name, misc.precision, misc.recall, misc.f1, misc.rows) == ("MISC", 0, 0, 0, 1)
    assert (per.name, per.precision, per.recall, per.f1, per.rows) == ("PER", 1, 1, 1, 1)
    over = entity_metrics([["B-A", "O", "O"]], [["B-A", "B-B", "O"]])
    assert over == pytest.approx(
        {"entity_precision": 0.5, "entity_recall": 1.0, "entity_f1": 2 / 3}
    )
    assert set(entity_metrics([["O"]], [["O"]]).values()) == {None}
    assert has_entities(["O", "B-A", "I-A"])
    assert not has_entities(["NOUN", "O"])
    assert not has_entities(["O"])


# Rows


def conll(rows: list[tuple[list[str], list[str]]]) -> str:
    sentences = (
        "".join(f"{word} x {tag}\n" for word, tag in zip(*row, strict=True)) for row in rows
    )
    return "-DOCSTART- -X- O\n\n" + "\n".join(sentences)


def rows_of(count: int) -> list[tuple[list[str], list[str]]]:
    """Sentences in which `film` and `song`, each alone or after `good`, are things."""
    found = []
    for at in range(count):
        words, tags = [WORDS[(7 * at) % 5], "was"], ["O", "O"]
        if at % 4 < 3:
            good, thing = ["good"] * (at % 2), ["film", "song"][at // 2 % 2]
            words += [*good, thing]
            tags += ["B-THING", "I-THING"][: len(good) + 1]
        found.append(([*words, "again"], [*tags, "O"]))
    return found


def write(folder: Path, rows: list[tuple[list[str], list[str]]], ending: str = "conll") -> Path:
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        lines = (json.dumps({"tokens": words, "tags": tags}) + "\n" for words, tags in rows)
        text = conll(rows) if ending == "conll" else "".join(lines)
        (folder / f"{split}.{ending}").write_text(text)
    return folder


@pytest.fixture
def recipe(recipe_file: Path, data: Path) -> Path:
    for file in data.iterdir():
        file.unlink()
    write(data, rows_of(24))
    recipe_file.write_text(recipe_file.read_text().replace("task: sst2", "task: tags"))
    return recipe_file


def loaded(folder: Path, **more: Any) -> Tagging:
    return load_tagging(Source(str(folder), "tags"), **more)


def test_conll_files_and_lists_are_the_same_rows(tmp_path: Path) -> None:
    one = loaded(write(tmp_path / "a", rows_of(8)))
    two = loaded(write(tmp_path / "b", rows_of(8), "jsonl"))
    assert one.train is not None
    assert two.train is not None
    assert one.labels == two.labels == TAGS
    assert one.train.to_dict() == two.train.to_dict()
    words, tags = rows_of(8)[1]
    assert one.train[1] == {"words": words, "label": [TAGS.index(tag) for tag in tags], "row": 1}
    assert one.metrics == (
        "entity_f1",
        "entity_precision",
        "entity_recall",
        "token_accuracy",
        "loss",
    )


def test_tags_of_a_hub_set_are_codes_with_names(tmp_path: Path) -> None:
    features = datasets.Features(
        words=datasets.List(datasets.Value("string")),
        ner_tags=datasets.List(datasets.ClassLabel(names=["O", "B-X"])),
    )
    rows = {"words": [["a", "b"], ["c"]], "ner_tags": [[0, 1], [0]]}
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    task = loaded(tmp_path, text=["words"], label="ner_tags")
    assert task.train is not None
    assert task.labels == ("O", "B-X")
    assert task.train["label"][:] == [[0, 1], [0]]
    other = loaded(tmp_path, text=["words"], label="ner_tags", labels=["B-X", "O"], train=False)
    assert other.evaluation[""]["label"][:] == [[1, 0], [1]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("good O\nbad\n", "train.conll:2: a line has a word and its tag"),
        ("good \xff O\n", "train.conll: not UTF-8"),
    ],
)
def test_a_broken_conll_file_is_located(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "train.conll").write_bytes(text.encode("latin-1"))
    with pytest.raises(SiftError) as caught:
        read_conll([tmp_path / "train.conll"])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("row", "more", "said"),
    [
        ((["a", "b"], ["O"]), {}, "not as many tags as words: 1 rows, such as row 8 ('2 and 1')"),
        (([], []), {}, "no words in 'tokens': 1 rows, such as row 8"),
        ((["a"], ["B-X"]), {"labels": TAGS}, "tags outside {0: 'B-THING', 1: 'I-THING', 2: 'O'}"),
        ((["a"], ["O"]), {"label": "ner"}, "has no column 'ner'; it has tokens, tags"),
        (
            (["a"], ["O"]),
            {"metrics": ["f1"]},
            "data.metrics: f1 is a metric of classes, and",
        ),
        (
            (["a"], ["X"]),
            {"first": "entity_f1"},
            "eval.metric: entity_f1 is of entities, such as",
        ),
    ],
)
def test_mistakes_are_located(
    tmp_path: Path, row: tuple[list[str], list[str]], more: dict[str, Any], said: str
) -> None:
    folder = write(tmp_path / "a", [*rows_of(8), row], "jsonl")
    with pytest.raises(SiftError) as caught:
        loaded(folder, **more)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.text=[a, b]", "data.text: task: tags takes one column, of lists"),
        ("train.class_weights=balanced", "it belongs to rows with a label each, and would do"),
        ("train.head_start=probe", "train.head_start: probe needs a head that gives a row's label"),
        ("data.max_length=2", "no word is left among 2 tokens"),
    ],
)
def test_mistakes_in_a_recipe(recipe: Path, tmp_path: Path, change: str, said: str) -> None:
    for command in (["train", "--out", tmp_path / "run"], ["plan"]):
        done = sift(*command, recipe, "--set", change)
        assert done.returncode == 2
        assert said in done.stderr


# Pieces


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """Words in pieces of a letter or two."""
    letters = "abcde.é"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, "ab", "cd"]
    vocabulary += [f"##{one}" for one in (*letters, "ab", "cd")]
    codes = {one: code for code, one in enumerate(vocabulary)}
    inner = Tokenizer(WordPiece(codes, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


PIECES = pieces_tokenizer()
WORD_ROWS = st.lists(
    st.lists(st.text("abcde.éz", min_size=1, max_size=5), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
)


@given(WORD_ROWS, st.integers(4, 14))
def test_a_word_is_told_from_its_first_piece_as_transformers_numbers_them(
    rows: list[list[str]], length: int
) -> None:
    tags = [list(range(len(row))) for row in rows]
    source = datasets.Dataset.from_dict(
        {"words": rows, "label": tags, "row": list(range(len(rows)))}
    )
    data = encode_words(source, PIECES, length)
    for row, one in zip(rows, data.rows, strict=True):
        theirs = PIECES(row, is_split_into_words=True, truncation=True, max_length=length)
        numbers = theirs.word_ids()
        seen = sorted({number for number in numbers if number is not None})
        assert one["input_ids"] == theirs["input_ids"]
        assert one["label"] == seen
        assert one["firsts"] == [numbers.index(number) for number in seen]
    whole = [len(PIECES(row, is_split_into_words=True)["input_ids"]) for row in rows]
    assert data.truncated == sum(size > length for size in whole)


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_lie_at_first_pieces_wherever_padding_is(side: str) -> None:
    tokenizer = pieces_tokenizer()
    tokenizer.padding_side = side
    rows = {"words": [["abe", "c"], ["d"]], "label": [[1, 0], [2]], "row": [0, 1]}
    task = Tagging(TAGS)
    data = encode_words(datasets.Dataset.from_dict(rows), tokenizer, 10)
    batch = task.collate(data.take([0, 1]), tokenizer)
    for ids, labels, tags in zip(batch["input_ids"], batch["labels"], rows["label"], strict=True):
        told = labels != -100
        assert labels[told].tolist() == tags
        first = [tokenizer.convert_ids_to_tokens(int(one)) for one in ids[told]]
        assert first == [["ab", "c"], ["d"]][len(tags) % 2]


# Loss, metrics, and a run


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_loss_and_metrics_are_those_of_transformers_and_scikit_learn(
    architecture: str, recipe: Path, tmp_path: Path
) -> None:
    save_base(tmp_path / "m", architecture)
    changes = [f"model.path={tmp_path / 'm'}", "eval.max_tokens=40"]
    changes.append("data.metrics=[token_accuracy, f1_macro, entity_f1]")
    session = open_session(load_recipe(recipe, changes))
    assert session.train is not None
    session.model.eval()
    batch = session.collate(session.train.take(range(24)))
    made = session.model(**batch)
    parts = [[*range(10)], [*range(10, 24)]]
    assert float(add_gradient(session, parts)) == pytest.approx(made.loss.item(), rel=1e-5)
    found = session.evaluate()
    told = batch["labels"] != -100
    truth, said = batch["labels"][told].numpy(), made.logits.argmax(-1)[told].numpy()
    assert found["token_accuracy"] == metrics.accuracy_score(truth, said)
    assert found["f1_macro"] == metrics.f1_score(truth, said, average="macro")
    assert found["loss"] == pytest.approx(made.loss.item(), rel=1e-5)
    lines = session.lines(session.predict())[""]
    assert [tag for line in lines for tag in line["predicted"]] == [TAGS[code] for code in said]


def test_a_run_learns_and_all_that_comes_after_knows_of_it(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = ["train.epochs=15", "selection.density=0.2", "train.learning_rate=0.02"]
    sets = [part for change in changes for part in ("--set", change)]
    done = sift("train", recipe, "--out", out, *sets)
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["kind"], summary["labels"]) == ("tags", [*TAGS])
    assert summary["metrics"]["entity_f1"] > 0.9 > summary["metrics_before"]["entity_f1"]
    scored = json.loads(sift("eval", out, "--json").stdout)
    assert scored["metrics"] == pytest.approx(summary["metrics"])
    assert [one["name"] for one in scored["classes"]] == ["THING"]
    asked = json.loads(sift("predict", out, "bad was good film again", "--json").stdout)
    (said,) = asked["predictions"]
    assert said["tags"] == ["O", "O", "B-THING", "I-THING", "O"]
    assert said["entities"] == [{"kind": "THING", "words": "good film"}]
    finished = Run.load(out)
    assert finished.predict(["bad was good film again"]) == [said]
    with pytest.raises(SiftError, match=r"was trained on tokens; give texts"):
        finished.predict([("bad was", "good film")])
    shown = sift("predict", out, "bad was good film again")
    assert "good film (THING)" in shown.stdout
    assert shown.stderr == ""
    merged = sift("merge", out / "delta.safetensors", "--out", tmp_path / "merged", "--json")
    assert merged.returncode == 0, merged.stderr
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["architectures"] == ["BertForTokenClassification"]
    again = sift("eval", tmp_path / "merged", "--recipe", recipe, "--json")
    assert json.loads(again.stdout)["metrics"] == pytest.approx(summary["metrics"])
    undone = sift(
        "merge",
        out / "delta.safetensors",
        "--base",
        tmp_path / "merged",
        "--undo",
        "--out",
        tmp_path / "undone",
    )
    assert undone.returncode == 0, undone.stderr
    card = (out / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card
    assert "<tr><td>THING</td>" in (out / "report.html").read_text()
    planned = sift("plan", recipe, *sets)
    assert planned.returncode == 0, planned.stderr
    shown = sift("data", "show", recipe, "--row", "1").stdout
    assert "label O O B-THING I-THING O" in shown
    base = load_recipe(recipe).model.path
    diffed = sift("diff", base, tmp_path / "merged", "--out", tmp_path / "d.safetensors")
    assert diffed.returncode == 0, diffed.stderr
