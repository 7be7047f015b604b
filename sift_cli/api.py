"""The Python interface: what the commands do, as functions; they call the same ones.

`import sift_cli as sift` has these names, with `Delta`, `Recipe` and `sparsify`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sift_cli.errors import SiftError
from sift_cli.recipe import Recipe, RecipeLike, recipe_of
from sift_cli.system import shipped
from sift_cli.system.launch import launched
from sift_cli.tasks.table import LONGEST_ANSWER, text_columns

if TYPE_CHECKING:
    from rich.console import Console

    from sift_cli.delta import Delta
    from sift_cli.models.loading import LoadedModel
    from sift_cli.runs.callbacks import Callback
    from sift_cli.runs.session import Session
    from sift_cli.runs.summary import Summary

PathOf = str | PathLike[str]


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and what its summary.json holds.

    It may stand wherever a run folder does, as in `merge(run, "merged")`.
    """

    folder: Path
    summary: Summary

    @classmethod
    def load(cls, folder: PathOf) -> Run:
        """The run in a folder of `train`; SiftError where none has finished there."""
        from sift_cli.runs.summary import Summary

        summary = Summary.read(Path(folder))
        if summary is None:
            raise SiftError(f"{fspath(folder)}: no finished run is there; train into it first")
        return cls(Path(folder), summary)

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """The metrics of the weights that were kept, by name; those before are in `summary`."""
        return self.summary.metrics

    @cached_property
    def delta(self) -> Delta:
        """The change that training made."""
        from sift_cli.delta import load_delta
        from sift_cli.runs.folder import DELTA_FILE

        return load_delta(self.folder / DELTA_FILE)

    def predict(
        self,
        texts: Sequence[str] | Sequence[tuple[str, str]],
        *,
        device: str | None = None,
        max_new_tokens: int = LONGEST_ANSWER,
    ) -> list[dict[str, Any]]:
        """What the tuned model makes of each text, or pair of texts: as `sift predict --json`.

        A language model answers, in at most `max_new_tokens`. The model is loaded once. Raises
        SiftError for pairs where a row of the training had one text, or otherwise.
        """
        from sift_cli.models.devices import pick_device
        from sift_cli.runs.tuned import task_of_loaded
        from sift_cli.tasks.classification import Classification
        from sift_cli.tasks.language import Language
        from sift_cli.tasks.prompts import prompts_of
        from sift_cli.tasks.tagging import Tagging

        firsts, seconds = _texts(texts)
        if not firsts:
            return []
        loaded, recipe = self._loaded
        task, where = task_of_loaded(loaded, recipe), pick_device(device)
        if isinstance(task, Language):
            if seconds is not None:
                raise SiftError("predict: a language model takes texts, no pairs of them")
            prompts = prompts_of(firsts, task.takes_text(loaded.tokenizer))
            answers = task.answers(loaded, prompts, device=where, longest=max_new_tokens)
            return [{"text": one.shown(), **answer.to_json()} for one, answer in answers]
        assert isinstance(task, Classification | Tagging)
        limit = None
        if recipe is not None:
            columns = text_columns(recipe.data.task, recipe.data.text)
            if len(columns) != (1 if seconds is None else 2):
                raise SiftError(
                    f"predict: {self.folder} was trained on {' and '.join(columns)}; give "
                    f"{'texts' if len(columns) == 1 else 'pairs of texts'}"
                )
            limit = recipe.data.max_length
        return task.predict(loaded, firsts, seconds, device=where, max_length=limit)

    @cached_property
    def _loaded(self) -> tuple[LoadedModel, Recipe | None]:
        from sift_cli.runs.tuned import load_tuned

        return load_tuned(str(self.folder))


def _texts(given: object) -> tuple[list[str], list[str] | None]:
    """The texts, and the second ones of pairs. Raises SiftError for anything else."""
    rows = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [None]
    texts = [row for row in rows if isinstance(row, str)]
    if len(texts) == len(rows):
        return texts, None
    pairs = [row for row in rows if isinstance(row, tuple | list) and len(row) == 2]
    if len(pairs) < len(rows) or not all(isinstance(one, str) for pair in pairs for one in pair):
        raise SiftError("predict: give a list of texts, or of pairs of texts")
    return [one for one, _ in pairs], [other for _, other in pairs]


def train(
    recipe: RecipeLike,
    out: PathOf | None = None,
    *,
    overrides: Sequence[str] = (),
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_code: bool = False,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
) -> Run:
    """Trains, evaluates, and writes the run folder and its report: `sift train`.

    `recipe` is a file, the name of a shipped one, a dict of its keys, or a `Recipe`; each of
    `overrides` is a text `section.key=value`. The folder is `out`, the recipe's own, or
    runs/NAME-OF-FILE. `resume` goes on from the newest checkpoint there, `overwrite` replaces a
    run. `quiet` shows no progress.

    Raises SiftError, whose `code` is what the command exits with. A SIGINT or SIGTERM ends the
    run after the step (code 130), all saved; `resume` then comes to the same delta.
    """
    if resume and overwrite:
        raise SiftError("resume goes on with a run, overwrite replaces it; give one of them")
    resolved = recipe_of(recipe, overrides)
    folder = folder_of(recipe, out or resolved.out)
    from rich.console import Console

    from sift_cli.training import train as run

    summary = run(
        resolved,
        folder,
        device=device,
        resume=resume,
        overwrite=overwrite,
        allow_code=allow_code,
        callbacks=callbacks,
        console=Console(stderr=True, quiet=quiet, markup=False, soft_wrap=True),
    )
    if resolved.log.report and launched().main:
        _report(folder, Console(stderr=True, markup=False, soft_wrap=True))
    return Run(folder, summary)


def _report(folder: Path, console: Console) -> None:
    """Writes the page of the run's report; where that fails, it must not fail the run itself."""
    from sift_cli.analysis.report import report

    try:
        report(folder)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        console.print(f"no report ({reason}); `sift report {folder}` tries again", markup=False)


def evaluate(
    tuned: PathOf,
    recipe: RecipeLike | None = None,
    *,
    split: str | None = None,
    data: PathOf | None = None,
    overrides: Sequence[str] = (),
    base: PathOf | None = None,
    device: str | None = None,
    allow_code: bool = False,
) -> Mapping[str, float | None]:
    """The metrics of a run, a delta on its base, or any model folder: `sift eval`.

    They are of the data of `recipe`, or of the recipe that travels with `tuned`, and of its
    `eval.split` unless `split` names another; or of all rows of a file `data`, or the split of a
    folder. `allow_code` lets metrics name functions in files. Raises SiftError.
    """
    session = session_of(
        tuned,
        recipe,
        split=split,
        data=data,
        overrides=overrides,
        base=base,
        device=device,
        allow_code=allow_code,
    )
    return session.evaluate()


def session_of(
    tuned: PathOf,
    recipe: RecipeLike | None = None,
    *,
    split: str | None = None,
    data: PathOf | None = None,
    overrides: Sequence[str] = (),
    base: PathOf | None = None,
    device: str | None = None,
    allow_code: bool = False,
) -> Session:
    """The tuned model on the data that `evaluate` scores it by."""
    path = fspath(tuned)
    given = None if recipe is None else recipe_of(recipe, overrides)
    from sift_cli.runs.session import open_session
    from sift_cli.runs.tuned import load_tuned, require_texts, with_rows

    loaded, own = load_tuned(path, None if base is None else fspath(base))
    if given is None:
        if own is None:
            raise SiftError(f"{path} carries no recipe; name the data with --recipe")
        given = recipe_of(own, overrides)
    elif own is not None:
        require_texts(path, own, len(text_columns(given.data.task, given.data.text)))
    if data is not None:
        given, split = with_rows(given, fspath(data), split, loaded.model.config)
    return open_session(
        given, device=device, train=False, split=split, tuned=loaded, allow_code=allow_code
    )


def probe(
    recipe: RecipeLike,
    out: PathOf | None = None,
    *,
    policies: Sequence[str] = (),
    steps: int = 30,
    overrides: Sequence[str] = (),
    device: str | None = None,
    allow_code: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measures on your model and data what sparse fine-tuning rests on: `sift probe`.

    Writes probe.json, which it returns, and plots into `out`, runs/NAME-OF-FILE-probe if not given.
    """
    resolved = recipe_of(recipe, overrides)
    folder = folder_of(recipe, out, "-probe")
    from rich.console import Console

    from sift_cli.analysis import probe as run

    return run(
        resolved,
        folder,
        policies=policies,
        steps=steps,
        device=device,
        allow_code=allow_code,
        console=Console(stderr=True, quiet=quiet, markup=False, soft_wrap=True),
    )


def folder_of(recipe: RecipeLike, out: PathOf | None, ending: str = "") -> Path:
    """`out`, or the folder that is named after the recipe's file.

    Raises SiftError where there is none.
    """
    if out:
        return Path(out)
    if not isinstance(recipe, str | PathLike):
        raise SiftError("out: name a folder; a recipe that is no file gives it no name")
    return Path(f"runs/{shipped.find(fspath(recipe)).stem}{ending}")
