"""`sift push` against a stand-in for the hub; no real host is asked."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from sift_cli.delta.file import load_delta
from sift_cli.recipe import load_recipe
from sift_cli.system.files import sha256_of
from sift_cli.training import train
from tests.support.command import sift
from tests.support.hub import Hub, hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library's
TOKEN = "hf_a-secret-that-no-one-may-read"
SENT = {"README.md", "delta.safetensors", "recipe.yaml", "summary.json", "report.html"}


@pytest.fixture
def run(recipe_file: Path, tmp_path: Path) -> Path:
    train(load_recipe(recipe_file), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and a library that asks it and none other."""
    with hub(TOKEN) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_it_uploads_delta_card_and_report(run: Path, there: Hub) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = sift("push", run, "--repo", "me/rte-sift")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{there.url}/me/rte-sift"
    repo = there.repos["me/rte-sift"]
    assert repo["visibility"] == "private"
    files = repo["files"]
    assert {name for name in files if not name.startswith("plots/")} == SENT
    assert "plots/entries.png" in files
    for data in files.values():
        assert str(run.parent).encode() not in data  # nor any other place of this machine
    assert files["README.md"] == (run / "README.md").read_bytes()
    sent = run.parent / "sent.safetensors"
    sent.write_bytes(files["delta.safetensors"])
    assert json.loads(files["summary.json"])["delta_sha256"] == sha256_of(sent)
    delta, own = load_delta(sent), load_delta(run / "delta.safetensors")
    assert delta.rest == own.rest
    assert all(torch.equal(one.bits, own.weights[name].bits) for name, one in delta.weights.items())
    assert len(there.stored) == 1  # the delta went the way of large files
    assert b"most confident mistakes" not in files["report.html"]
    assert b"left out of this copy" in files["report.html"]
    assert {path: path.read_bytes() for path in before} == before
    assert TOKEN not in done.stdout + done.stderr
    assert all(TOKEN.encode() not in data for data in [*files.values(), *before.values()])


def test_public_texts_and_a_repository_that_is_there(run: Path, there: Hub) -> None:
    assert sift("push", run, "--repo", "short", "--public").returncode == 0
    assert there.repos["me/short"]["visibility"] == "public"
    done = sift("push", run, "--repo", "me/short", "--texts", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f'{{\n  "repo": "{there.url}/me/short"\n}}\n'
    assert there.repos["me/short"]["visibility"] == "public"
    assert b"most confident mistakes" in there.repos["me/short"]["files"]["report.html"]


def test_what_the_hub_refuses_is_one_line(
    run: Path, there: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = sift("push", run, "--repo", "others/x")
    assert (done.returncode, "403" in done.stderr) == (2, True)
    done = sift("push", run, "--repo", "a/b/c")
    assert done.returncode == 2
    assert done.stderr.startswith("--repo a/b/c: ")
    card = run / "README.md"
    card.write_text(card.read_text().replace("license: unknown\n", ""))
    done = sift("push", run, "--repo", "me/x")
    assert done.returncode == 2
    assert "Invalid metadata in README.md" in done.stderr
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    done = sift("push", run, "--repo", "me/y")
    assert (done.returncode, "401" in done.stderr) == (2, True)
    for said in (done.stderr, done.stdout):
        assert "hf_wrong" not in said
    assert set(there.repos) == {"me/x"}
    assert there.repos["me/x"]["files"] == {}


def test_without_a_token_a_run_or_a_network(
    run: Path, there: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    done = sift("push", run, "--repo", "me/x")
    assert done.returncode == 2
    assert "hf auth login" in done.stderr
    done = sift("push", tmp_path, "--repo", "me/x")
    assert "no finished run" in done.stderr
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert sift("push", run, "--repo", "me/x").returncode == 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = sift("push", run, "--repo", "me/x")
    assert done.returncode == 2
    assert done.stderr.startswith("push: the hub at http://127.0.0.1:9: ")
    assert there.asked == []


def test_the_environment_names_the_hub(run: Path) -> None:
    with hub(TOKEN) as server:
        env = {**os.environ, "HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
               "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
        command = [sys.executable, "-m", "sift_cli", "push", str(run), "--repo", "me/x"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        assert "delta.safetensors" in server.repos["me/x"]["files"]
