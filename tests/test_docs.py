"""What README and docs say: commands that run, links that lead somewhere, current pages."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
from huggingface_hub import constants

from sift_cli.analysis.jobs import Runner
from sift_cli.cli import app, options
from tests.support import forks
from tests.support.causal import save_causal, save_talker
from tests.support.command import job_here, sift
from tests.support.hub import hub

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


RECIPE_COMMANDS = ("train", "probe", "compare", "plan")  # they take a recipe first
CHATS = "runs/chats"  # a run of a language model, of a recipe of that name where a page has it
TOKEN = "hf_token"


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """Title and text of each block of the language."""
    found = re.findall(
        rf"```{language}(?: title=\"([^\"]+)\")?\n(.*?)```", page.read_text(), re.DOTALL
    )
    return [(title, text) for title, text in found]


def commands(page: Path) -> list[list[str]]:
    """The lines of shell blocks that begin with `sift`."""
    lines = [line for _, block in blocks(page, "sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("sift ")]


def in_small(args: list[str], base: Path, data: Path, own: Mapping[str, str]) -> list[str]:
    """The command with a tiny model; and with tiny data, unless its recipe names the page's own."""
    if any("task: instruct" in own.get(arg, "") for arg in args):
        changes = [
            f"model.path={base.parent / 'causal'}",
            "data.max_length=256",
            "train.max_steps=6",
        ]
        return [*args, *(part for change in changes for part in ("--set", change))]
    if args[:2] == ["data", "show"]:
        changes = [f"model.path={base}", f"data.path={data}", "data.task=sst2"]
        return [*args, *(part for change in changes for part in ("--set", change))]
    if args[1:2] == [CHATS] and "chats.yaml" not in own:
        return [args[0], str(base.parent / "talker"), *args[2:]]
    if args[0] not in RECIPE_COMMANDS:
        return [str(base) if arg == "roberta-base" else arg for arg in args]
    changes = [f"model.path={base}", "data.max_length=16", "train.max_steps=6"]
    if "path/to" in own.get(args[1], "path/to"):
        changes += [f"data.path={data}", "data.task=sst2"]
        if "rte" in args[1]:  # a task of pairs
            changes.append("data.text=[sentence, sentence]")
    if args[0] == "compare":  # a process for each run
        rated = [args[at + 1].split("=")[0] for at, word in enumerate(args) if word == "--lr"]
        args = [*args, "--methods", ",".join(["sift", "head-only", *rated]), "--seeds", "1"]
    return [*args, *(part for change in changes for part in ("--set", change))]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's
@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run(
    page: Path, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, on the page's own files and stand-ins for models, GLUE and the hub."""
    shown = commands(page)
    own = {
        title: text
        for kind in ("yaml", "json", "text", "csv")
        for title, text in blocks(page, kind)
        if title
    }
    for title, text in [*blocks(ROOT / "docs/language-models.md", "json"), *own.items()]:
        if title:
            (tmp_path / title).write_text(text)
    if CHATS in str(shown):
        save_causal(base.parent / "causal", "llama-tied")
        save_talker(base.parent / "talker")
    (tmp_path / "docs").mkdir()
    for table in (ROOT / "docs").glob("*.csv"):  # as from the checkout, and as from docs/
        shutil.copy(table, tmp_path)
        shutil.copy(table, tmp_path / "docs")
    (tmp_path / "new.csv").write_text("sentence,label\ngood film,positive\nbad film,negative\n")
    tuned = [at for at, args in enumerate(shown) if "my-tuned-model" in args]
    if tuned:
        shown.insert(tuned[0], ["merge", "runs/rte", "--out", "my-tuned-model"])
    if "runs/rte" in str(shown) and not any(args[0] == "train" for args in shown):
        shown.insert(0, ["train", "glue/rte", "--out", "runs/rte"])
    monkeypatch.setattr(Runner, "_process", job_here)
    monkeypatch.setattr(options, "launch", forks.launch)
    with hub(TOKEN) as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for args in shown:
            with monkeypatch.context() as patch:
                patch.setattr(constants, "HF_HUB_OFFLINE", args[0] != "push")
                done = sift(*in_small(args, base, data, own), cwd=tmp_path)
            assert done.returncode == 0, (args, done.stderr)


MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_the_python_of_a_page_runs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order and in one namespace, on a tiny model and a file of rows."""
    rows = [f"a {word} film,{number % 2}" for number, word in enumerate(["bad", "good"] * 20)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows, ""]))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for _, block in blocks(ROOT / "docs/python.md", "python"):
        small = block.replace(MINILM, str(base)).replace('"holdout"', '"max_length": 16, "holdout"')
        exec(small, names)
    said = capsys.readouterr().out
    assert "'accuracy'" in said
    assert said.count("entries train") == 3
    for made in ("delta.safetensors", "runs/trainer/delta.safetensors"):
        assert names["sift"].Delta.load(made).header.policy == "sift"


def test_the_pages_show_what_they_are_meant_to() -> None:
    ran = {page.name: [args[0] for args in commands(page)] for page in PAGES}
    assert ran["README.md"] == ["train", "predict", "predict", "merge", "data", "train", "chat"]
    assert {"train", "report", "predict", "merge", "eval", "push"} <= set(ran["tutorial.md"])
    group = typer.main.get_command(app)
    assert set(ran["cli.md"]) == set(group.commands)


def test_commands_in_running_text_are_commands() -> None:
    group = typer.main.get_command(app)
    for page in PAGES:
        for line in re.findall(r"`sift ([a-z][^`]*)`", page.read_text().replace("\n", " ")):
            words = shlex.split(line)
            command = group.commands.get(words[0])
            assert command is not None, (page.name, line)
            given = {word.split("=")[0] for word in words if word.startswith("--")}
            known = {name for one in command.params for name in [*one.opts, *one.secondary_opts]}
            assert given <= known | {"--help"}, (page.name, line)


def test_the_site_has_every_page_and_no_other() -> None:
    listed = re.findall(r'= "([^"]+\.md)"', (ROOT / "zensical.toml").read_text())
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages), "a page of docs/ is one line of nav in zensical.toml"


def test_the_site_builds_with_strict_links_and_fetches_nothing() -> None:
    site = script("site")
    done = subprocess.run(
        [sys.executable, site.__file__], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((ROOT / "build/site").rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text()
        tags = re.findall(r"<(?:script|link|img|iframe|source)[^>]*>", text)
        fetched = [tag for tag in tags if re.search(r"(src|href)=.?(https?:)?//", tag)]
        assert not [tag for tag in fetched if 'rel="canonical"' not in tag], page


def test_links_out_of_the_site_become_names() -> None:
    site = script("site")
    page = ROOT / "docs/benchmarks.md"
    text = "[a](quality.md) [b](../benchmarks/steps.py) [c](https://x.org) ![d](../x.png) [e](#f)"
    assert site.inside(text, page) == text.replace(
        "[b](../benchmarks/steps.py)", "`benchmarks/steps.py`"
    )


def script(name: str) -> Any:
    """A script of the project as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_is_on_the_first_page_and_the_other_way_round() -> None:
    group = typer.main.get_command(app)
    page = (ROOT / "docs/index.md").read_text()
    named = set(re.findall(r"^\| `sift (\w+)", page, re.MULTILINE))
    assert named == set(group.commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    ("name", "page"), [("recipe_reference", "recipe.md"), ("cli_reference", "cli.md")]
)
def test_a_reference_is_current(name: str, page: str) -> None:
    assert (ROOT / "docs" / page).read_text() == script(name).reference(), f"run scripts/{name}.py"


def test_make_targets_of_the_pages_exist() -> None:
    made = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        blocks = "".join(re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL))
        assert set(re.findall(r"^make ([\w-]+)", blocks, re.MULTILINE)) <= made


def test_constraints_are_exact_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert "torch==2.13.0" in lines
