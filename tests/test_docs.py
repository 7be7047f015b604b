"""What README and docs say: commands that run, links that lead somewhere, current pages."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer
from test_cli import sift

from sift_cli.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The lines of shell blocks that begin with `sift`."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("sift ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_readme_commands_run(base: Path, data: Path, tmp_path: Path) -> None:
    tiny = [f"model.path={base}", f"data.path={data}", "data.task=sst2", "data.max_length=16"]
    ran = []
    for args in commands(ROOT / "README.md"):
        if args[0] == "train":
            args = [*args, *(part for change in tiny for part in ("--set", change))]
        done = sift(*args, cwd=tmp_path)
        assert done.returncode == 0, (args, done.stderr)
        ran.append(args[0])
    assert ran == ["recipes", "train", "merge", "predict"]
    assert (tmp_path / "runs/rte/merged/model.safetensors").is_file()


def test_every_command_is_in_the_readme_and_the_other_way_round() -> None:
    group = typer.main.get_command(app)
    named = set(re.findall(r"^\| `sift (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named == set(group.commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_recipe_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("ref", ROOT / "scripts/recipe_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/recipe.md").read_text() == module.reference(), "run the script"


def test_make_targets_of_the_pages_exist() -> None:
    made = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        blocks = "".join(re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL))
        assert set(re.findall(r"^make (\w+)", blocks, re.MULTILINE)) <= made


def test_constraints_are_exact_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert "torch==2.13.0" in lines
