"""Benchmarks: tasks of lm-eval on a tuned model in memory, and what a run keeps of the results.

lm-eval is loaded when a benchmark runs, and its words and bars go to stderr.
"""

import difflib
import hashlib
import json
import logging
import os
import random
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sift_cli.delta.build import versions
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.devices import pick_device
from sift_cli.models.loading import LoadedModel, quiet
from sift_cli.recipe import Recipe
from sift_cli.runs.folder import EVALUATIONS, delta_file
from sift_cli.runs.language import language_of
from sift_cli.runs.summary import Summary
from sift_cli.runs.tuned import load_tuned
from sift_cli.system.faults import fault_of
from sift_cli.system.files import sha256_of, write_text
from sift_cli.tasks.coder import DAY
from sift_cli.tasks.language import Language, is_causal
from sift_cli.tasks.table import LANGUAGE

NEAR = 3  # names in the message about one that is unknown
SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "shots": 1234}  # those of lm-eval's command


@dataclass(frozen=True)
class Asked:
    """What to measure, and how.

    `folder` holds more tasks. `limit` is how many rows of each task are taken, `shots` how many
    solved rows stand before each; None leaves both to the task. `template` tells whether prompts
    are put as chats; None: where the model was trained on such.
    """

    tasks: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    shots: int | None = None
    template: bool | None = None
    batch_size: int = 1


@dataclass(frozen=True)
class PromptStyle:
    """How prompts are put: as chats by a template (Jinja), under a system turn; None: plainly."""

    template: str | None = None
    system: str | None = None


@dataclass(frozen=True)
class Row:
    """One metric of a task that came about in one way, with the value of each run that has it."""

    task: str
    metric: str
    way: str
    values: list[float | None]


def run_benchmarks(
    source: str,
    asked: Asked,
    *,
    base: str | None = None,
    device: str | None = None,
    silent: bool = False,
) -> dict[str, Any]:
    """The scores of a run, a delta on its base or a model folder, and what they depend on.

    Raises SiftError where lm-eval is not installed, for a task that it does not know or cannot run,
    for a model that is no causal one, and what `load_tuned` raises.
    """
    require_lm_eval()
    began = time.perf_counter()
    with _telling(asked), _aside(silent):
        manager = _manager(asked)
        _seed()
        tasks = manager.load(list(asked.tasks))
    _refuse_unsafe(tasks["tasks"])
    loaded, recipe = load_tuned(source, base)
    if not is_causal(loaded.model.config):
        raise SiftError(
            f"--tasks: {source} is {type(loaded.model).__name__}, and these tasks are for causal "
            "language models; without --tasks it is scored on its own data"
        )
    style = style_of(loaded, recipe, asked.template)
    loaded.model.to(pick_device(device))  # type: ignore[arg-type]
    with _telling(asked), _aside(silent):
        found = _evaluated(loaded, tasks, asked, style)
    delta = delta_file(source)
    return {
        "model": {
            "source": source,
            "delta_sha256": sha256_of(delta) if delta.is_file() else None,
            "base": base or (recipe.model.path if recipe else None),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
        },
        "settings": {
            "template": style.template is not None,
            "template_sha256": _sha256(style.template),
            "system": style.system,
            "limit": asked.limit,
            "shots": asked.shots,
            "batch_size": asked.batch_size,
            "seeds": SEEDS,
        },
        "versions": versions() | {"lm_eval": version("lm_eval")},
        "device": str(loaded.model.device),
        "seconds": round(time.perf_counter() - began, 1),
        "is_benchmark": asked.limit is None,
        "tasks": found,
    }


def require_lm_eval() -> Any:
    """lm-eval; raises SiftError where it is not installed."""
    try:
        import lm_eval
    except ImportError:
        raise SiftError(
            "--tasks: the package lm-eval is not installed; `pip install 'sift-cli[eval]'`"
        ) from None
    return lm_eval


def style_of(loaded: LoadedModel, recipe: Recipe | None, template: bool | None) -> PromptStyle:
    """How prompts are put to a model: as in its training, unless `template` says otherwise.

    Raises SiftError where a template is asked for and there is none.
    """
    task = Language("instruct")
    if recipe is not None and recipe.data.task in LANGUAGE:
        task = language_of(recipe)
        if template is None:
            template = task.name == "instruct" and recipe.data.format != "prompt"
    if not template:
        return PromptStyle()
    chosen = task.coder(loaded.tokenizer).template
    if chosen is None:
        raise SiftError("the model has no chat template; --no-template puts prompts as they are")
    return PromptStyle(chosen.text, task.wording.system)


def _manager(asked: Asked) -> Any:
    """What finds the tasks. Those of lm-eval are read, which takes seconds, where they are needed.

    Raises SiftError for a name that it does not know.
    """
    from lm_eval.tasks import TaskManager

    if asked.folder is not None:
        if not asked.folder.is_dir():
            raise SiftError(f"--tasks-path {asked.folder}: no such folder")
        own = TaskManager(include_path=str(asked.folder), include_defaults=False)
        if {*asked.tasks} <= {*own.all_subtasks}:
            return own
    folder = None if asked.folder is None else str(asked.folder)
    manager = TaskManager(include_path=folder)
    for name in asked.tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=NEAR)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise SiftError(f"--tasks: unknown: {name!r}; {hint}")
    return manager


def _refuse_unsafe(tasks: Mapping[str, Any]) -> None:
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise SiftError(
                f"--tasks {name}: it runs code that the model writes, which sift does not; merge, "
                "and run lm-eval on the folder with --confirm_run_unsafe_code in a container"
            )


def _seed() -> None:
    """Seeds all that tasks may draw from, as lm-eval's command does."""
    random.seed(SEEDS["python"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])


def _evaluated(
    loaded: LoadedModel, tasks: Mapping[str, Any], asked: Asked, style: PromptStyle
) -> dict[str, Any]:
    """Of each task and group its version, shots, rows and metrics; the model is used as it is."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (own != 0 and asked.shots is not None):  # 0 is meant, as in lm-eval
            task.set_config("num_fewshot", asked.shots or 0)
        task.set_fewshot_seed(SEEDS["shots"])
    chats = style.template is not None
    model = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size=asked.batch_size,
        add_bos_token=False if chats else None,  # a template writes its own beginning
        chat_template_args=(
            {"chat_template": style.template, "strftime_now": DAY.strftime} if chats else None
        ),
    )
    results = evaluate(
        model,
        tasks,
        limit=asked.limit,
        log_samples=False,
        apply_chat_template=chats,
        fewshot_as_multiturn=chats,
        system_instruction=style.system,
    )
    return {
        name: {
            "version": results["versions"].get(name),
            "shots": results["n-shot"].get(name),
            "rows": results["n-samples"].get(name, {}).get("effective"),
            "of": results["n-samples"].get(name, {}).get("original"),
            "metrics": metrics_of(values),
        }
        for name, values in results["results"].items()
    }


def metrics_of(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Value and standard error by metric, from what lm-eval says of a task.

    Its keys are METRIC,FILTER and METRIC_stderr,FILTER; a filter that does nothing is not named.
    """
    found = {}
    for key, value in values.items():
        metric, comma, name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        shown = metric if name == "none" else f"{metric} ({name})"
        found[shown] = {
            "value": _number(value),
            "stderr": _number(values.get(f"{metric}_stderr,{name}")),
        }
    return found


def store(results: Mapping[str, Any], asked: Asked, run: Path) -> Path:
    """Writes results into a run's folder: the same tasks in the same way replace each other."""
    folder = run / EVALUATIONS
    folder.mkdir(exist_ok=True)
    told = json.dumps([asdict(asked) | {"folder": None}, results["settings"]], default=list)
    name = "".join(one if one.isalnum() or one in "-_.+" else "_" for one in "+".join(asked.tasks))
    path = folder / f"{name[:80]}-{hashlib.sha256(told.encode()).hexdigest()[:8]}.json"
    write(results, path)
    return path


def write(results: Mapping[str, Any], path: Path) -> None:
    """Writes results as JSON, whole or not at all."""
    write_text(path, json.dumps(results, indent=2) + "\n")


def beside(runs: Sequence[Path]) -> list[Row]:
    """What finished runs have stored; scores that came about in different ways share no row.

    Results of another delta than the run now holds are left out. Raises SiftError (exit code 3) for
    a file that cannot be understood.
    """
    rows: dict[tuple[str, str, str], list[float | None]] = {}
    for at, run in enumerate(runs):
        summary = Summary.read(run)
        for file in sorted((run / EVALUATIONS).glob("*.json")):
            try:
                found = json.loads(file.read_bytes())
                if summary is None or found["model"]["delta_sha256"] != summary.delta_sha256:
                    continue
                for task, metric, way, value in _scores(found):
                    row = rows.setdefault((task, metric, way), [None] * len(runs))
                    row[at] = value
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise SiftError(f"{file}: damaged: {error}", ExitCode.WRONG_FILE) from None
    return [Row(*key, values) for key, values in sorted(rows.items())]


def _scores(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float | None]]:
    """Task, metric, way and value of each score of stored results."""
    settings = found["settings"]
    chats = "on" if settings["template"] else "off"
    rows = "all rows" if settings["limit"] is None else f"{settings['limit']} rows, no benchmark"
    seeds = "" if settings["seeds"] == SEEDS else f", seeds {settings['seeds']}"
    for name, task in found["tasks"].items():
        way = f"version {task['version']}, {task['shots']} shots, template {chats}, {rows}"
        way += f"{seeds}, lm-eval {found['versions']['lm_eval']}"
        for metric, one in task["metrics"].items():
            yield name, metric, way, one["value"]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and isfinite(value) else None


def _sha256(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _telling(asked: Asked) -> Iterator[None]:
    """Makes one line of what goes wrong in a task: its files and code are anyone's."""
    try:
        yield
    except SiftError:
        raise
    except Exception as error:
        if fault_of(error):
            raise
        said = (str(error).strip().splitlines() or [""])[0]
        names = ",".join(asked.tasks)
        raise SiftError(
            f"--tasks {names}: lm-eval cannot run them: {type(error).__name__}: {said}"
        ) from error


@contextmanager
def _aside(silent: bool) -> Iterator[None]:
    """Keeps stdout clean, and lm-eval to its bars; or to nothing, where `silent`."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            to = nowhere if silent else sys.stderr
            with redirect_stdout(to), redirect_stderr(to):
                yield
    finally:
        log.setLevel(level)
