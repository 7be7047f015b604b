"""What recipes, deltas and models from strangers cannot do (docs/security.md)."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sift_cli.delta.file import load_delta, save_delta
from sift_cli.errors import SiftError
from sift_cli.models.loading import model_folder
from tests.support.command import sift
from tests.support.models import save_base

SOURCE = Path(__file__).parent.parent / "sift_cli"
SECRET = "hf_thisIsNoOnesTokenAtAll"


def files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def test_tokens_are_neither_stored_nor_printed(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    out = tmp_path / "run"
    printed = [
        sift("train", recipe_file, "--out", out, "--set", "checkpoint.every=1"),
        sift("merge", out / "delta.safetensors", "--out", tmp_path / "merged"),
        sift(
            "--debug", "train", recipe_file, "--out", tmp_path / "x", "--set", "log.tensorboard=1"
        ),
        sift("train", recipe_file, "--set", "model.path=no/where", "--out", tmp_path / "x"),
        sift("env"),
        sift("env", "--json"),
    ]
    assert "HF_TOKEN" in printed[-1].stdout
    assert not any(SECRET in done.stdout + done.stderr for done in printed)
    held = list(files(tmp_path))
    assert len(held) > 10
    assert not any(SECRET.encode() in path.read_bytes() for path in held)


def test_names_in_a_delta_lead_nowhere(recipe_file: Path, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    assert sift("train", recipe_file, "--out", inside / "run").returncode == 0
    delta = load_delta(inside / "run/delta.safetensors")
    for number, evil in enumerate(["../../evil", "/tmp/evil-of-sift", "..\\evil"]):
        (name,) = list(delta.weights)[:1]
        delta.weights[evil] = delta.weights.pop(name)
        delta.dense[evil + ".dense"] = torch.ones(3)
        recipe = {**delta.header.recipe, "out": "../../evil"}
        header = delta.header.model_copy(update={"recipe": recipe})
        path = inside / f"evil-{number}.safetensors"
        save_delta(path, replace(delta, header=header))
        before = sorted(files(tmp_path))
        for args in (["merge", path, "--out", inside / "merged"], ["eval", path]):
            done = sift(*args, cwd=inside)
            assert done.returncode in (2, 3), done.stderr
        assert sorted(files(tmp_path)) == before
    assert not Path("/tmp/evil-of-sift").exists()


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears once code of a package or of a model folder has run."""
    sprung = tmp_path / "sprung"
    code = f"from pathlib import Path\nPath({str(sprung)!r}).touch()\n"
    for folder in ("trappackage", "trappackage/sub", "model"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(code)
    (tmp_path / "model/modeling_trap.py").write_text(code + "class Config: ...\n")
    (tmp_path / "model/tokenization_trap.py").write_text(code + "class Tokenizer: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return sprung


def test_a_package_is_looked_into_and_not_imported(trap: Path) -> None:
    for path in ("pkg:trappackage/model", "pkg:trappackage.sub/model", "pkg:trappackage.sub"):
        with pytest.raises(SiftError):
            model_folder(path)
    assert "trappackage" not in sys.modules
    assert not trap.exists()


def test_code_in_a_model_folder_does_not_run(trap: Path, recipe_file: Path, tmp_path: Path) -> None:
    model = save_base(tmp_path / "model")
    for file, auto in (
        ("config.json", {"AutoConfig": "modeling_trap.Config"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_trap.Tokenizer", None]}),
    ):
        values = json.loads((model / file).read_text()) | {"auto_map": auto}
        (model / file).write_text(json.dumps(values))
    args = ("train", recipe_file, "--set", f"model.path={model}", "--set", "train.max_steps=1")
    assert sift(*args, "--out", tmp_path / "run").returncode == 0
    config = json.loads((model / "config.json").read_text()) | {"model_type": "trap"}
    (model / "config.json").write_text(json.dumps(config))
    done = sift(*args, "--out", tmp_path / "other")
    assert done.returncode == 2
    assert "should not have" not in done.stderr
    assert not trap.exists()


def test_the_source_has_no_way_to_run_what_it_reads() -> None:
    unsafe = re.compile(
        r"\bpickle|torch\.load\(|yaml\.(unsafe_|full_)?load\((?!text, Loader=_Loader)|"
        r"trust_remote_code=True|weights_only=False|(?<![.\w])(eval|exec)\(|shell=True|os\.system"
    )
    found = [
        f"{path.name}: {line.strip()}"
        for path in SOURCE.rglob("*.py")
        for line in path.read_text().splitlines()
        if unsafe.search(line) and not line.strip().startswith(("raise SiftError", "#"))
    ]
    assert found == []
