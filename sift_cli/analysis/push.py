"""A finished run on the model hub."""

import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from sift_cli.analysis.report import report
from sift_cli.errors import SiftError
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
        page = report(run, out=Path(made), texts=texts)
        pictures = sorted((Path(made) / PLOTS).iterdir())
        files = {name: run / name for name in FILES} | {REPORT_FILE: page}
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
