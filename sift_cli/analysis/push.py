"""A finished run on the model hub."""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from sift_cli.analysis.report import report
from sift_cli.delta.file import load_delta, save_delta
from sift_cli.errors import SiftError
from sift_cli.recipe import load_recipe
from sift_cli.runs.cards import without_places
from sift_cli.runs.folder import (
    CARD_FILE,
    DELTA_FILE,
    PLOTS,
    RECIPE_FILE,
    REPORT_FILE,
    SUMMARY_FILE,
)

# What the library raises: for an error of the hub, no network, a card it refuses, a failed upload.
# The bases of HfHubHTTPError are the errors of the HTTP client that it uses.
REFUSALS: tuple[type[Exception], ...] = (
    *HfHubHTTPError.__bases__,
    OfflineModeIsEnabled,
    ValueError,
    RuntimeError,
    OSError,
)
FILES = (CARD_FILE, DELTA_FILE, RECIPE_FILE, SUMMARY_FILE)


def push(run: Path, repo: str, *, private: bool = True, texts: bool = False) -> str:
    """Uploads delta, card, recipe, summary and report in one commit; returns the page's address.

    The repository is made if it is not there; one that is there stays as visible as it is. The
    report is made anew, without a row of the data unless `texts`; predictions stay here. The token
    is the one that `hf auth login` or HF_TOKEN gave. Raises SiftError where `run` is no finished
    run, where there is no token, and for what the hub refuses.
    """
    lacking = [name for name in FILES if not (run / name).is_file()]
    if lacking:
        raise SiftError(f"{run} is no finished run: it holds no {lacking[0]}")
    if get_token() is None:
        raise SiftError("push: no token for the hub; run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    with tempfile.TemporaryDirectory() as made:
        copy = public_copy(run, Path(made) / run.resolve().name)
        page = report(copy, texts=texts)
        pictures = sorted((copy / PLOTS).iterdir())
        files = {name: copy / name for name in FILES} | {REPORT_FILE: page}
        files |= {f"{PLOTS}/{picture.name}": picture for picture in pictures}
        adding = [CommitOperationAdd(name, path) for name, path in files.items()]
        try:
            made_at = api.create_repo(repo, private=private, exist_ok=True)
            api.create_commit(made_at.repo_id, adding, commit_message="Upload a run of sift")
        except HFValidationError as error:
            raise SiftError(f"--repo {repo}: {_first_line(error)}") from None
        except REFUSALS as error:
            raise SiftError(f"push: the hub at {api.endpoint}: {_first_line(error)}") from None
    return str(made_at)


def public_copy(run: Path, out: Path) -> Path:
    """A copy of a finished run without the places of this machine: local paths by their last part.

    Neither the card, which has none, nor the weights of the delta change; its header does.
    """
    out.mkdir()
    for file in [run / CARD_FILE, *run.glob("*.jsonl")]:
        shutil.copyfile(file, out / file.name)
    recipe = load_recipe(run / RECIPE_FILE).model_dump(mode="json")
    text = yaml.safe_dump(without_places(recipe), sort_keys=False, allow_unicode=True)
    (out / RECIPE_FILE).write_text(text, encoding="utf-8")
    delta = load_delta(run / DELTA_FILE)
    header = delta.header
    base = header.base.model_copy(update={"path": Path(header.base.path).name})
    if header.recipe is not None:
        shown = without_places(header.recipe)
        base = header.base.model_copy(update={"path": shown["model"]["path"]})
        header = header.model_copy(update={"recipe": shown})
    header = header.model_copy(update={"base": base})
    mark = save_delta(out / DELTA_FILE, replace(delta, header=header))
    summary = json.loads((run / SUMMARY_FILE).read_text(encoding="utf-8"))
    summary |= {"delta_sha256": mark, "delta_bytes": (out / DELTA_FILE).stat().st_size}
    (out / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return out


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
