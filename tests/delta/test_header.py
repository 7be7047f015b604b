"""The header: every key that a file holds survives, and none is made up."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sift_cli.delta import Delta, load_delta, save_delta
from sift_cli.delta.file import _canonical, _digest
from sift_cli.delta.header import ENVELOPE, Base, Header

BASE = {"path": "somewhere", "dtype": "float32"}
HEADERS: dict[str, dict[str, Any]] = {
    "the least": {"base": BASE},
    "values that are null": {
        "base": {**BASE, "revision": None, "architectures": None, "vocabulary": None},
        "labels": None,
        "recipe": None,
        "task": None,
        "logits": None,
    },
    "values that are empty": {"base": {**BASE, "tied": {}, "kept_dtypes": {}}, "versions": {}},
    "floats": {
        "base": BASE,
        "logits": [[1e-05, -0.0], [1.0, 1]],
        "metrics": {"f1": None, "accuracy": 1},
        "recipe": {"train": {"learning_rate": 1e-05, "epochs": 3, "weight_decay": 0.0}},
    },
    "unknown keys": {
        "base": {**BASE, "commit": "abc", "sizes": [1, 2.5, None]},
        "author": {"name": "\u00e4", "at": [1, {"b": 2, "a": 1}]},
        "copy": True,
        "to_json": 1,
        "model_config": None,
    },
    "kinds that no sift writes": {
        "base": BASE,
        "task": 5,
        "policy": ["a"],
        "metrics": "none",
        "composed": 1.5,
        "difference": [],
    },
}


def forge(path: Path, header: dict[str, Any]) -> None:
    """A file without weights that says just this."""
    said = {**header, "format": 1, "coding": "rice-deflate", "weights": {}, "rest": "0123abcd"}
    tensors = {"weights": torch.empty(0, dtype=torch.uint8)}
    text = _canonical({**said, "digest": _digest(said, tensors)})
    save_file(tensors, path, metadata={"sift": text})


@pytest.mark.parametrize("kind", HEADERS)
def test_what_is_read_and_saved_is_the_same_bytes(kind: str, tmp_path: Path) -> None:
    forge(tmp_path / "forged", HEADERS[kind])
    delta = load_delta(tmp_path / "forged")
    save_delta(tmp_path / "again", delta)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "forged").read_bytes()
    assert delta.about == HEADERS[kind]
    assert list(delta.about) == sorted(HEADERS[kind])


@pytest.mark.parametrize("name", ["delta-v1", "delta-v1-patterned"])
def test_golden_files_hold_no_more_after_a_change(name: str, tmp_path: Path) -> None:
    delta = load_delta(Path(__file__).parent / f"golden/{name}.safetensors")
    assert delta.header == Header(base=Base(path="somewhere", dtype="float32"))
    changed = delta.header.model_copy(update={"logits": None, "composed": {"rule": "sum"}})
    save_delta(tmp_path / "changed", replace(delta, header=changed))
    with safe_open(tmp_path / "changed", framework="pt") as file:
        keys = json.loads(file.metadata()["sift"]).keys()
    assert keys == {"base", "logits", "composed", *ENVELOPE}
    assert load_file(tmp_path / "changed").keys() == {
        "weights",
        *map("dense/".__add__, delta.dense),
    }


def test_a_header_is_typed_and_stays_as_it_is(tmp_path: Path) -> None:
    forge(tmp_path / "forged", HEADERS["floats"])
    delta = load_delta(tmp_path / "forged")
    assert delta.header.base.path == "somewhere"
    assert delta.header.base.tied == {}
    assert delta.header.labels is None
    with pytest.raises(ValidationError, match="frozen"):
        delta.header.labels = ["a"]
    delta.about["recipe"]["train"]["epochs"] = 9  # of a copy
    assert delta.header.recipe is not None
    assert delta.header.recipe["train"]["epochs"] == 3


def test_nothing_of_the_envelope_is_in_a_header(tmp_path: Path) -> None:
    forge(tmp_path / "forged", {"base": BASE})
    delta = load_delta(tmp_path / "forged")
    assert not ENVELOPE & delta.about.keys()
    own = Header.model_validate({"base": BASE, "format": 7, "weights": {"a": 1}, "rest": "x"})
    save_delta(tmp_path / "again", Delta({}, {}, "0123abcd", own))
    assert (tmp_path / "again").read_bytes() == (tmp_path / "forged").read_bytes()
