"""Mistakes that cost no imports, surroundings that are poor: each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from tests.support.command import ENV
from tests.support.models import save_base

HEAVY = ("torch", "transformers", "datasets", "pandas", "numpy")
PROGRAM = f"""
import sys
from sift_cli.cli import main
try:
    main()
finally:
    print([name for name in {HEAVY} if name in sys.modules])
"""


def sift(*args: str | bytes, **env: str) -> tuple[int, str, str]:
    """Exit code, heavy modules that were imported, and what was said."""
    command = [sys.executable, "-c", PROGRAM, *args]
    done = subprocess.run(command, capture_output=True, env={**ENV, **env}, check=False)
    return done.returncode, done.stdout.decode().strip(), done.stderr.decode(errors="replace")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("train {r}", "data.path: {d}/rows.txt is not one of .parquet, .jsonl"),
        ("train {r} --set data.path={d}/empty.csv", "the split 'train' is empty"),
        ("train {r} --set data.path={d}/none.csv", "no such folder or file"),
        ("train {r} --set model.path=./none", "model.path: ./none: no such folder"),
        ("train {r} --device tpu", "--device tpu: no such device"),
        ("plan {r} --set model.path=./none", "model.path: ./none: no such folder"),
        ("probe {r}", "data.path: {d}/rows.txt is not one of"),
        ("compare {r}", "data.path: {d}/rows.txt is not one of"),
        ("data show {r}", "data.path: {d}/rows.txt is not one of"),
        ("eval runs/none", "runs/none: no such folder or file; a run, a delta or a model"),
        ("eval a/b --data {d}/rows.txt", "data.path: {d}/rows.txt is not one of"),
        ("predict runs/none text", "runs/none: no such folder or file"),
        ("chat runs/none --once hello", "runs/none: no such folder or file"),
        ("merge none.safetensors --out x", "none.safetensors: no such delta file"),
        ("inspect runs/none", "runs/none: no such delta file"),
        ("export runs/none --out x", "runs/none: no such delta file"),
        ("diff ./a ./b --out x", "./a: no such folder or file"),
        ("report runs/none", "runs/none: no finished run"),
        ("push runs/none --repo a/b", "runs/none: no finished run"),
        ("compare {d}", "no finished run"),
    ],
)
def test_a_mistake_costs_no_imports(tmp_path: Path, args: str, said: str) -> None:
    (tmp_path / "rows.txt").write_text("text")
    (tmp_path / "empty.csv").write_text("text,label\n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {{path: a/b}}\ndata: {{path: {tmp_path}/rows.txt, task: sst2}}\n")
    names = {"r": str(recipe), "d": str(tmp_path)}
    code, heavy, told = sift(*args.format(**names).split())
    assert (code, heavy) == (2, "[]")
    assert said.format(**names) in told


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_rows_are_read_where_no_cache_can_be_written(tmp_path: Path, ending: str) -> None:
    """Nor is a locale needed that knows more than ASCII."""
    file, base = tmp_path / f"rows.{ending}", save_base(tmp_path / "base")
    rows = datasets.Dataset.from_dict({"sentence": ["good é"] * 8, "label": [0, 1] * 4})
    {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[ending](file)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{path: {base}}}\ndata: {{path: {file}, task: sst2, holdout: 0.5}}\n"
    )
    (tmp_path / "taken").write_text("a file, where a folder of caches would be")
    poor = {"HF_HOME": f"{tmp_path}/taken", "XDG_CACHE_HOME": f"{tmp_path}/taken", "LC_ALL": "C"}
    code, _, told = sift("data", "show", str(recipe), **poor)
    assert code == 0, told


def test_a_device_that_is_absent_costs_no_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    from sift_cli.cli import checks

    monkeypatch.setattr(checks.sys, "platform", "linux")
    monkeypatch.setattr(checks, "GPUS", ())
    for name in ("cuda", "mps", "cuda:1"):
        with pytest.raises(checks.SiftError, match=f"--device {name}: not on this .* there is cpu"):
            checks.check_device(name)
    monkeypatch.setattr(checks, "GPUS", ("null",))
    checks.check_device("cuda")


def test_an_argument_that_is_no_utf_8() -> None:
    code, heavy, told = sift("predict", "runs/x", b"caf\xe9")
    assert (code, heavy) == (2, "[]")
    assert told.startswith("argument 3 is not UTF-8: ")


def test_a_console_that_cannot_say_a_letter_spells_it_out() -> None:
    name = "é→"
    for encoding in ("ascii", "cp437"):
        code, _, told = sift("train", f"{name}.yaml", PYTHONIOENCODING=encoding)
        assert code == 2
        assert "\\u2192.yaml: no such recipe" in told
        assert "Traceback" not in told
