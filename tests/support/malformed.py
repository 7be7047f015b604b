"""Recipes and datasets that are wrong in some way, any number of them, by seed."""

import csv
import io
import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Recipe = dict[str, Any]
Row = dict[str, Any]

LISTS = ("target", "dense")
WRONG_VALUES: dict[tuple[str, str], list[Any]] = {
    ("train", "epochs"): [0, -1, "many", [1], {}, float("inf"), float("nan")],
    ("train", "batch_size"): [0, -4, 1.5, "8x", None, True, 10.0],
    ("train", "max_steps"): [0, -1, 0.5, "all"],
    ("train", "learning_rate"): [0, -1e-3, "fast", [1e-3], float("nan")],
    ("train", "warmup"): [1, 1.5, -0.1, "none"],
    ("train", "lr_schedule"): ["step", 3, None, ["linear"]],
    ("train", "max_grad_norm"): [0, -1, "one"],
    ("train", "precision"): ["float16", 16, None],
    ("train", "gradient_checkpointing"): ["perhaps", 3, None, []],
    ("train", "seed"): [-1, 2**32, 1.5, "x", None],
    ("train", "skip_nonfinite"): [-1, 1.5, "few", True],
    ("train", "accumulate"): [0, -2, "two", 1.5],
    ("model", "path"): [None, 3, [], {}],
    ("model", "dtype"): ["float8", 32, None, "fp32"],
    ("data", "path"): [None, 7, ["a"], {}],
    ("data", "task"): ["sst3", None, 3, []],
    ("data", "text"): [[], ["a", "b", "c"], 3, {}],
    ("data", "labels"): [["one"], "ab", 3, {}],
    ("data", "metrics"): [["recall"], 3, [], {}],
    ("data", "max_length"): [0, -1, "long", 1.5],
    ("data", "holdout"): [0, 1, 2, -0.1, "some"],
    ("selection", "policy"): ["shift", None, 3, []],
    ("selection", "density"): [0, 1.1, -0.5, "dense", {}, {"default": 2}, {"*.query": 0.1}, []],
    ("selection", "budget"): [0, -1, 1.5, "all"],
    ("selection", "score"): ["gradients", "a.txt:f", "a.py:1f", 3],
    ("selection", "scope"): ["tensors", 3],
    ("selection", "structure"): ["entries", 3],
    ("selection", "schedule"): ["first", 3],
    ("selection", "batches"): [0, -1, "all", 1.5],
    ("selection", "target"): [3, {}, [1], None],
    ("selection", "dense"): [3, {}, [1], None],
    ("eval", "every"): ["day", 0, -1, 1.5, None, []],
    ("eval", "keep"): ["worst", None, 3],
    ("eval", "batch_size"): [0, "x", None],
    ("checkpoint", "every"): [0, -1, "10", "10 min", "0s", 1.5, True, [], "min"],
    ("log", "every"): [0, -1, "x", None],
    ("log", "tensorboard"): ["x", 7, None],
}
CONTRADICTIONS: list[Recipe] = [
    {"selection": {"density": 0.1, "budget": 100}},
    {"selection": {"rank": 8}},
    {"selection": {"history": "park"}},
    {"selection": {"every": 5}},
    {"selection": {"balance": 0.5}},
    {"selection": {"score": "agreement"}},
    {"selection": {"warmup_steps": 5}},
    {"selection": {"block_size": 4}},
    {"selection": {"scope": "neuron", "structure": "row"}},
    {"selection": {"scope": "global", "density": {"default": 0.1}}},
    {"selection": {"score": "change"}},
    {"data": {"path": "x", "task": "custom"}},
]
BROKEN_LINES = [
    "train: {epochs: 3",
    "train: [1, 2",
    "\ttrain: 3",
    "train: *nowhere",
    "train: 'open",
    'train: "\\q"',
    "train: {seed: 1}\ntrain: {seed: 2}",
    "train: {seed: 1, seed: 2}",
    "  stray: 1",
    "? [1, 2]\n: 3",
    "3: three",
    "train: !!python/object/apply:os.getcwd []",
    "train: !!python/name:os.system ''",
    "train: !unknown 3",
    "train: {<<: 3}",
    "--- \na: 1\n--- \nb: 2",
    "%BAD\n---",
    "out: 2024-13-45",
    "train: &a [*a]",
    "train: {seed: " + "1" * 5000 + "}",
    "train: " + "[" * 3000,
    "out: \x07",
    "@",
]


def valid_recipe() -> Recipe:
    """What every wrong one begins as."""
    return {
        "model": {"path": "./nowhere"},
        "data": {"path": "./nowhere", "task": "sst2"},
        "selection": {"policy": "sift"},
        "train": {"epochs": 1, "batch_size": 8},
        "eval": {"keep": "last"},
    }


def malformed_recipe(seed: int) -> tuple[str, bytes]:
    """The kind of mistake, and the bytes of the file."""
    rng = random.Random(f"recipe {seed}")
    kinds = [
        _value,
        _value,
        _key,
        _section,
        _lacking,
        _contradiction,
        _broken,
        _cut,
        _noise,
        _bytes,
    ]
    make = rng.choice(kinds)
    return make.__name__.strip("_"), make(rng)


def _dump(recipe: Recipe) -> bytes:
    return yaml.safe_dump(recipe, sort_keys=False).encode()


def _value(rng: random.Random) -> bytes:
    recipe = valid_recipe()
    for section, key in rng.sample(list(WRONG_VALUES), rng.randint(1, 3)):
        recipe.setdefault(section, {})[key] = rng.choice(WRONG_VALUES[section, key])
    return _dump(recipe)


def _key(rng: random.Random) -> bytes:
    recipe = valid_recipe()
    section = rng.choice(list(recipe))
    key = rng.choice(list(recipe[section]))
    at = rng.randrange(len(key))
    wrong = key[:at] + rng.choice(string.ascii_lowercase) + "_" + key[at + 1 :]
    recipe[section][wrong] = recipe[section].pop(key)
    return _dump(recipe)


def _section(rng: random.Random) -> bytes:
    recipe = valid_recipe()
    section = rng.choice(list(recipe))
    wrong: list[Any] = [3, "text", [1, 2], True, ["a"]]
    if rng.random() < 0.5:
        recipe[section] = rng.choice(wrong)
    else:
        recipe[section + rng.choice("xyz")] = recipe.pop(section)
    return _dump(recipe)


def _lacking(rng: random.Random) -> bytes:
    recipe = valid_recipe()
    section, key = rng.choice([("model", "path"), ("data", "path"), ("data", "task"), ("data", "")])
    if key:
        del recipe[section][key]
    else:
        del recipe[section]
    return _dump(recipe)


def _contradiction(rng: random.Random) -> bytes:
    recipe = valid_recipe()
    for section, values in rng.choice(CONTRADICTIONS).items():
        recipe[section] |= values
    return _dump(recipe)


def _broken(rng: random.Random) -> bytes:
    lines = _dump(valid_recipe()).decode().splitlines()
    tops = [at for at, line in enumerate(lines) if not line.startswith(" ")]
    lines.insert(rng.choice([*tops[1:], len(lines)]), rng.choice(BROKEN_LINES))
    return "\n".join(lines).encode()


def _cut(rng: random.Random) -> bytes:
    whole = _dump(valid_recipe())
    return whole[: rng.randrange(whole.index(b"sst2") + 2)]


def _noise(rng: random.Random) -> bytes:
    count = rng.randint(0, 200)
    return "".join(rng.choices(string.printable + "äß→☃", k=count)).encode()


def _bytes(rng: random.Random) -> bytes:
    whole = bytearray(_dump(valid_recipe()))
    at = rng.randrange(len(whole))
    whole[at:at] = bytes(rng.choices(range(128, 192), k=rng.randint(1, 5)))
    return bytes(whole)


def rows_of(count: int, seed: int = 0) -> list[Row]:
    """Sentences with labels, as SST-2 has them."""
    rng = random.Random(seed)
    words = ["good", "bad", "film", "book", "very", "slow"]
    return [
        {"sentence": " ".join(rng.choices(words, k=rng.randint(2, 6))), "label": at % 2}
        for at in range(count)
    ]


def malformed_dataset(seed: int, folder: Path) -> tuple[str, Path]:
    """Writes one; returns the kind of mistake and the `data.path` to give."""
    rng = random.Random(f"data {seed}")
    folder.mkdir()
    kind = rng.choice(["rows", "rows", "rows", "file", "file", "split"])
    if kind == "rows":
        return _wrong_rows(rng, folder), folder
    if kind == "file":
        return _wrong_file(rng, folder), folder
    return _wrong_splits(rng, folder), folder


def _write(path: Path, rows: list[Row]) -> None:
    if path.suffix == ".csv":
        text = io.StringIO()
        columns = list(dict.fromkeys(key for row in rows for key in row)) or ["sentence", "label"]
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue())
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def _spoil(rows: list[Row], key: str, value: object, rng: random.Random, share: float) -> None:
    hit = rng.sample(range(len(rows)), max(1, int(share * len(rows))))
    for at in hit:
        rows[at][key] = value


def _wrong_rows(rng: random.Random, folder: Path) -> str:
    suffix = rng.choice(["jsonl", "csv", "parquet"])
    splits = {"train": rows_of(24), "validation": rows_of(12, 1)}
    where = rng.choice(list(splits))
    rows = splits[where]
    wrong_labels = [2, -1, 99, "neither", 0.5, 1.5, "2"] if suffix == "csv" else [2, -1, 99]
    share = rng.choice([0.05, 0.5])

    def label() -> None:
        _spoil(rows, "label", rng.choice(wrong_labels), rng, share)

    def all_labels() -> None:
        wrong: list[object] = ["neither", 0.5, [0, 1], {"is": 1}, "", 7]
        _spoil(rows, "label", rng.choice([7, "neither"] if suffix == "csv" else wrong), rng, 1)

    def no_label() -> None:
        _spoil(rows, "label", None, rng, share)

    def no_text() -> None:
        _spoil(rows, "sentence", None, rng, share)

    def no_column() -> None:
        gone = rng.choice(["label", "sentence"])
        for row in rows:
            del row[gone]

    def renamed_column() -> None:
        gone = rng.choice(["label", "sentence"])
        for row in rows:
            row[gone.upper()] = row.pop(gone)

    def one_class() -> None:
        for row in splits["train"]:
            row["label"] = 1

    ways: list[Callable[[], None]]
    ways = [label, all_labels, no_label, no_text, no_column, renamed_column, one_class]
    way = rng.choice(ways)
    way()
    for split, some in splits.items():
        _write(folder / f"{split}.{suffix}", some)
    return f"{way.__name__} in {suffix}"


def _wrong_file(rng: random.Random, folder: Path) -> str:
    suffix = rng.choice(["jsonl", "csv", "parquet"])
    for split, count in (("train", 24), ("validation", 12)):
        _write(folder / f"{split}.{suffix}", rows_of(count))
    path = folder / f"{rng.choice(['train', 'validation'])}.{suffix}"
    whole = path.read_bytes()
    if suffix == "parquet":
        ways = {
            "cut": whole[: rng.randrange(len(whole) - 1)],
            "noise": rng.randbytes(200),
            "empty": b"",
            "text": b"sentence,label\na,1\n",
        }
    elif suffix == "csv":
        ways = {
            "noise": rng.randbytes(200),
            "empty": b"",
            "header alone": b"sentence,label\n",
            "ragged": whole + b"a,1,2,3\n",
            "not UTF-8": whole + b"\xff\xfe,1\n",
            "no header": whole.partition(b"\n")[2],
        }
    else:
        ways = {
            "cut": whole[: rng.randrange(20, len(whole) - 30)].rstrip(b'0123456789}\n "'),
            "noise": rng.randbytes(200),
            "empty": b"",
            "white": b"\n \n\n",
            "a number": b"3\n",
            "not JSON": whole + b"{sentence: a}\n",
            "not UTF-8": whole + b'{"sentence": "\xff", "label": 1}\n',
            "nested": whole + b"[" * 2000 + b"\n",
        }
    kind = rng.choice(list(ways))
    path.write_bytes(ways[kind])
    return f"{kind} {suffix}"


def _wrong_splits(rng: random.Random, folder: Path) -> str:
    kind = rng.choice(["none", "no train", "no validation", "other names", "mixed", "folders"])
    if kind == "no train":
        _write(folder / "validation.jsonl", rows_of(12))
    elif kind == "no validation":
        _write(folder / "train.csv", rows_of(12))
    elif kind == "other names":
        _write(folder / f"rows-{rng.randint(0, 9)}.jsonl", rows_of(12))
    elif kind == "mixed":
        _write(folder / "train.jsonl", rows_of(12))
        _write(folder / "validation.csv", rows_of(12))
    elif kind == "folders":
        (folder / "train.jsonl").mkdir()
        _write(folder / "validation.jsonl", rows_of(12))
    return f"splits: {kind}"
