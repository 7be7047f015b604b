"""Mistakes that a look at names and folders shows: told before torch and its kin are imported."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sift_cli.errors import SiftError
from sift_cli.runs.folder import SUMMARY_FILE, delta_file

if TYPE_CHECKING:
    from sift_cli.recipe import Recipe

GPUS = ("nvidia[0-9]*", "nvhost*", "nvgpu", "kfd", "dxg")  # in /dev: NVIDIA's, AMD's, Windows'
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
RUNS = "runs"  # the folder of runs, where nobody says another


def check_arguments(arguments: Sequence[str]) -> None:
    """Raises SiftError for one that is no text: a byte that is no UTF-8."""
    spoken = sys.getfilesystemencoding()
    for number, argument in enumerate(arguments, 1):
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            way_out = "" if spoken == "utf-8" else "; PYTHONUTF8=1 makes UTF-8 of it"
            said = f"argument {number} is not {spoken.upper()}: {argument!a}{way_out}"
            raise SiftError(said) from None


def check_device(name: str | None) -> None:
    """Raises SiftError for a device that no look at the hardware would find."""
    if name is None:
        return
    kind = name.partition(":")[0]
    if kind not in ("cuda", "mps", "cpu"):
        raise SiftError(f"--device {name}: no such device; use cuda, mps or cpu")
    if sys.platform != "linux" or kind == "cpu":
        return
    there = ["cuda"] if any(any(Path("/dev").glob(one)) for one in GPUS) else []
    if kind not in there:
        raise SiftError(
            f"--device {name}: not on this machine; there is {', '.join([*there, 'cpu'])}"
        )


def check_recipe(recipe: "Recipe", device: str | None = None, data: bool = True) -> None:
    """Raises SiftError for a device, a model or (where `data`) rows that are not there."""
    check_device(device)
    path = recipe.model.path
    if is_local(path) and not Path(path).expanduser().exists():
        raise SiftError(f"model.path: {path}: no such folder")
    if data:
        check_rows(recipe.data.path, recipe.data.task)


def check_rows(path: str, task: str) -> None:
    """Raises SiftError for rows that are not there, of a wrong ending, or empty."""
    from sift_cli.tasks.sources import find_rows

    find_rows(path, task)


def check_tuned(path: str, device: str | None = None) -> None:
    """Raises SiftError where no run, delta or model can be at `path`, nor the device be there."""
    check_device(device)
    if is_local(path) and not delta_file(path).exists():
        raise SiftError(f"{path}: no such folder or file; a run, a delta or a model belongs here")


def check_delta(path: str | Path) -> None:
    """Raises SiftError where there is no delta file, nor a run that holds one."""
    found = delta_file(str(path))
    if not found.is_file():
        raise SiftError(f"{found}: no such delta file")


def check_runs(folders: Sequence[Path]) -> None:
    """Raises SiftError for a folder in which no run has finished."""
    for folder in folders:
        if not (folder / SUMMARY_FILE).is_file():
            raise SiftError(f"{folder}: no finished run; it holds no {SUMMARY_FILE}")


def is_local(path: str) -> bool:
    """Whether a path can be nothing on the hub: runs and files of sift, and what is no id."""
    if path.startswith("pkg:"):
        return False
    own = path.startswith(f"{RUNS}/") or path.endswith((".safetensors", ".gguf", ".yaml"))
    return own or not HUB_ID.fullmatch(path)
