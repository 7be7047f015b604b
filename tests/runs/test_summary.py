"""summary.json: what is written is read again, whatever version wrote it."""

import json
from pathlib import Path

import pytest

from sift_cli.errors import ExitCode, SiftError
from sift_cli.runs.summary import Summary

WHOLE = {
    "task": "rte",
    "policy": "sift",
    "seed": 1,
    "labels": None,
    "metrics": {"accuracy": 0.75},
    "metrics_before": {"accuracy": None},
    "trained_entries": 20,
    "dense_entries": 4,
    "changed_entries": 19,
    "total_entries": 1000,
    "steps": 6,
    "skipped_steps": 0,
    "kept_step": 3,
    "train_rows": 24,
    "truncated": {"train": 1, "evaluation": 0},
    "step_time_ms": 2.5,
    "train_time_s": 0.015,
    "wall_time_s": 0.1,
    "peak_memory_bytes": 5,
    "resumed_at": [2],
    "delta_bytes": 600,
    "delta_sha256": "ab",
    "device": "cpu",
    "bf16_autocast": False,
}
ADDED_SINCE = {"changed_entries", "skipped_steps", "resumed_at"}
NOT_OF_BASELINES = {"labels", "truncated", "delta_sha256"}


def test_it_is_written_as_it_was_read(tmp_path: Path) -> None:
    text = json.dumps(WHOLE, indent=2) + "\n"  # the order of keys is part of the file
    (tmp_path / "summary.json").write_text(text)
    summary = Summary.read(tmp_path)
    assert summary is not None
    (tmp_path / "again").mkdir()
    summary.write(tmp_path / "again")
    assert (tmp_path / "again/summary.json").read_text() == text
    assert Summary.read(tmp_path / "again") == summary


def test_what_an_adapter_adds_and_lacks() -> None:
    lacks = {"changed_entries", "delta_sha256"}
    values = {key: value for key, value in WHOLE.items() if key not in lacks} | {"rank": 2}
    written = Summary.of(values).to_json()
    assert written == values
    assert list(written)[:4] == ["task", "policy", "rank", "seed"]


def test_other_versions_are_read(tmp_path: Path) -> None:
    older = {k: v for k, v in WHOLE.items() if k not in ADDED_SINCE | NOT_OF_BASELINES}
    (tmp_path / "summary.json").write_text(json.dumps({**older, "from_tomorrow": 1}))
    summary = Summary.read(tmp_path)
    assert summary is not None
    assert summary.metrics == WHOLE["metrics"]
    assert (summary.labels, summary.changed_entries, summary.resumed_at) == (None, None, [])


def test_no_run_has_finished(tmp_path: Path) -> None:
    assert Summary.read(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "damaged: Expecting"),
        ("[]", "damaged: no JSON object"),
        ("\udcff", "damaged: 'utf-8' codec"),
        (json.dumps(WHOLE).replace('"steps"', '"step"'), "it lacks steps"),
    ],
)
def test_a_damaged_one_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SiftError, match=said) as raised:
        Summary.read(tmp_path)
    assert raised.value.code == ExitCode.WRONG_FILE
    assert str(tmp_path / "summary.json") in str(raised.value)
